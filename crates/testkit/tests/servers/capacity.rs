//! A server that is full says so, with the name of the limit, and creates nothing.

use connectrpc::ErrorCode;
use nagaya_testkit::{Client, Server, Wanted};

#[tokio::test(flavor = "multi_thread")]
async fn each_limit_of_the_host_is_named_when_it_is_reached() {
    for (limit, value) in
        [("slots_max", "0"), ("disk_free_mb_min", "1000000000"), ("memory_available_mb_min", "1000000000")]
    {
        let server = Server::start_with(&format!(
            "[pools]\nslots_ready = 0\nisolated_slots_ready = 0\n[namespace]\n{limit} = {value}\n"
        ));
        let client = Client::of(&server);
        let error = client.create(&Wanted::default()).await.err().expect("there is no room");
        assert_eq!(error.code, ErrorCode::ResourceExhausted, "{error}");
        let message = error.message.clone().unwrap_or_default();
        assert!(message.contains("capacity") && message.contains(limit), "{limit}: {message}");
    }
}
