//! The examples of the documentation, run as they stand.

#[allow(dead_code)]
#[path = "../../examples/first.rs"]
mod first;
#[allow(dead_code)]
#[path = "../../examples/network.rs"]
mod network;
#[allow(dead_code)]
#[path = "../../examples/streams.rs"]
mod streams;

use crate::world::World;

crate::cases!(the_first_example, the_example_of_streams, the_example_of_the_network);

async fn the_first_example(world: &World) {
    first::run(&world.client).await.unwrap();
}

async fn the_example_of_streams(world: &World) {
    streams::run(&world.client).await.unwrap();
}

async fn the_example_of_the_network(world: &World) {
    network::run(&world.client).await.unwrap();
}
