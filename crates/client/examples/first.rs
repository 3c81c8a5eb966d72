use nagaya_client::{Client, CreateOptions, Result};

/// Makes a sandbox, runs a program in it, moves a file, and removes it again.
pub async fn run(client: &Client) -> Result<()> {
    let session = client.create(CreateOptions::default().name(Some("first".into()))).await?;

    let output = session.command(["python3", "-c", "print(6 * 7)"]).output().await?.check()?;
    println!("it says {}", output.stdout_text().trim());

    session.files().write("note.txt", "what is written is read").await?;
    let note = session.files().read("/home/tenki/note.txt").await?;
    println!("the note is {} bytes long", note.len());

    session.close().await?;
    Ok(())
}

#[tokio::main]
pub async fn main() -> Result<()> {
    run(&Client::from_env()?).await
}
