use nagaya_client::{Client, CreateOptions, Error, Event, RefusalKind, Result, Signal, WriteOptions};
use tokio::io::AsyncWriteExt;

/// Talks with a running program, and copies a stream into a file.
pub async fn run(client: &Client) -> Result<()> {
    let session = client.create(CreateOptions::default()).await?;

    let mut running = session.command(["cat"]).start().await?;
    let mut stdin = running.take_stdin().expect("it was not taken before");
    stdin.write_all(b"hello\n").await?;
    while let Some(event) = running.next().await? {
        match event {
            Event::Stdout(bytes) => {
                println!("out: {}", String::from_utf8_lossy(&bytes).trim());
                running.signal(Signal::Term).await;
            }
            Event::Stderr(bytes) => println!("err: {}", String::from_utf8_lossy(&bytes).trim()),
        }
    }
    let output = running.wait().await?;
    println!("ended by signal {:?}", output.signal);

    // Any `AsyncRead` will do; it goes through in constant memory.
    let mut source: &[u8] = b"a large file";
    let mut file = session.files().writer("copy", WriteOptions::default()).await?;
    tokio::io::copy(&mut source, &mut file).await?;
    println!("{} bytes are acknowledged", file.finish().await?);

    match session.files().read("nothing").await {
        Err(Error::Refused { kind: RefusalKind::FileNotFound, message, .. }) => println!("as expected: {message}"),
        other => println!("a surprise: {other:?}"),
    }
    session.close().await?;
    Ok(())
}

#[tokio::main]
pub async fn main() -> Result<()> {
    run(&Client::from_env()?).await
}
