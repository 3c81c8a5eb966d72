use nagaya_client::{Client, CreateOptions, ExposeOptions, Result, TunnelOptions};

/// Opens a port of a sandbox to a browser, and a port of this machine to the sandbox.
pub async fn run(client: &Client) -> Result<()> {
    let session = client.create(CreateOptions::default()).await?;

    let service = session.command(["python3", "-m", "http.server", "8000"]).start().await?;
    let exposed = session.expose_port(8000, ExposeOptions::default()).await?;
    println!("open {}", exposed.preview_url);

    // What connects to this port in the sandbox reaches the database here.
    let tunnel = session.tunnel("127.0.0.1:5432", TunnelOptions::default()).await?;
    println!("the sandbox finds it at {}", tunnel.sandbox_address());

    tunnel.close().await;
    drop(service);
    session.close().await?;
    Ok(())
}

#[tokio::main]
pub async fn main() -> Result<()> {
    run(&Client::from_env()?).await
}
