//! `image`: what sandboxes can stand on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use nagaya_client::{Image, LayerProgress, PullEvent};

use crate::connect;
use crate::errors::{Failure, Local};
use crate::output::{Fields, OutputOptions, age, bytes, moment};

#[derive(Debug, Args)]
#[command(arg_required_else_help = true)]
pub struct Images {
    #[command(flatten)]
    output: OutputOptions,
    #[command(subcommand)]
    verb: ImageVerb,
}

#[derive(Debug, Subcommand)]
enum ImageVerb {
    /// Fetch an image from its registry.
    Pull {
        /// Such as `python:3.12` or `registry.example:5000/team/app@sha256:…`.
        #[arg(value_name = "IMAGE")]
        name: String,
    },
    /// Import images from an archive: an OCI layout in a tar, or what `docker save` writes.
    Import {
        /// The archive; `-` is standard input.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// What to call an image that has no name in the archive.
        #[arg(long, short = 't', value_name = "NAME", default_value = "", hide_default_value = true)]
        name: String,
    },
    /// List the images that came from elsewhere.
    #[command(alias = "list")]
    Ls,
    /// Show all about an image.
    Inspect {
        /// A name, a digest, or its first twelve or more digits.
        #[arg(value_name = "IMAGE")]
        name: String,
    },
    /// Take a name away, or all names of a digest, and remove what then nobody needs.
    #[command(alias = "remove")]
    Rm {
        /// A name, a digest, or its first twelve or more digits.
        #[arg(value_name = "IMAGE")]
        name: String,
    },
    /// Remove images without names on which no session and no snapshot stands.
    #[command(alias = "prune")]
    Gc,
}

impl Images {
    pub async fn run(self) -> Result<(), Failure> {
        let screen = self.output.screen();
        let client = connect::client()?;
        match self.verb {
            ImageVerb::Pull { name } => {
                let mut pulling = client.pull_image(&name).await?;
                let mut bars = Bars::new();
                while let Some(event) = pulling.next().await? {
                    match event {
                        PullEvent::Layer(layer) => bars.show(&layer),
                        PullEvent::Done(image) => {
                            bars.clear();
                            return screen.done(&*image, |image| format!("{name} is {}", image.digest));
                        }
                        _ => {}
                    }
                }
                bars.clear();
                let what = "the server ended before the image was there";
                Err(Failure::new(Local::Broken, what, "Repeat it: what arrived as a whole is kept."))
            }
            ImageVerb::Import { file, name } => {
                let imported = match file.as_os_str() == "-" {
                    true => client.import_images(tokio::io::stdin(), &name).await,
                    false => {
                        let archive = tokio::fs::File::open(&file).await;
                        client.import_images(archive.map_err(|error| Failure::reading(&file, &error))?, &name).await
                    }
                };
                let images = imported.map_err(|error| Failure::reading(Path::new(&file), &error))??;
                screen.list(&images, HEADINGS, cells)
            }
            ImageVerb::Ls => screen.list(&client.list_images().await?, HEADINGS, cells),
            ImageVerb::Inspect { name } => screen.item(&client.get_image(&name).await?, fields),
            ImageVerb::Rm { name } => {
                let freed = client.remove_image(&name).await?;
                screen.done(&freed, |freed| match freed.images {
                    0 => format!("{name} is no name of an image any more; the image stays, for something needs it"),
                    _ => format!("removed {name}, {} freed", bytes(freed.bytes)),
                })
            }
            ImageVerb::Gc => {
                let freed = client.prune_images().await?;
                screen.done(&freed, |freed| {
                    format!("{} images and {} layers removed, {} freed", freed.images, freed.layers, bytes(freed.bytes))
                })
            }
        }
    }
}

const HEADINGS: &[&str] = &["NAME", "DIGEST", "LAYERS", "SIZE", "ADDED"];

fn cells(image: &Image) -> Vec<String> {
    let name = if image.names.is_empty() { "-".to_owned() } else { image.names.join(" ") };
    vec![name, short(&image.digest), image.layers.len().to_string(), bytes(image.bytes()), age(image.added_at)]
}

/// As many digits as are certain to find it.
fn short(digest: &str) -> String {
    digest.strip_prefix("sha256:").unwrap_or(digest).chars().take(12).collect()
}

fn fields(image: &Image) -> Fields {
    let pairs = |pairs: &BTreeMap<String, String>| {
        pairs.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
    };
    let arguments =
        |arguments: &[String]| arguments.iter().map(|argument| format!("{argument:?}")).collect::<Vec<_>>().join(" ");
    vec![
        ("digest", image.digest.clone()),
        ("names", image.names.join(" ")),
        ("added", moment(image.added_at)),
        ("layers", image.layers.len().to_string()),
        ("size", bytes(image.bytes())),
        ("user", image.user.clone()),
        ("workdir", image.workdir.clone()),
        ("env", pairs(&image.env)),
        ("entrypoint", arguments(&image.entrypoint)),
        ("command", arguments(&image.command)),
        ("ports", image.exposed_ports.join(" ")),
        ("labels", pairs(&image.labels)),
    ]
}

/// A bar for each layer that is fetched; on a terminal only.
struct Bars {
    all: MultiProgress,
    by_position: BTreeMap<usize, ProgressBar>,
}

impl Bars {
    fn new() -> Self {
        Self { all: MultiProgress::new(), by_position: BTreeMap::new() }
    }

    fn show(&mut self, layer: &LayerProgress) {
        let bar = self.by_position.entry(layer.position).or_insert_with(|| {
            let bar = self.all.add(ProgressBar::new(layer.total));
            let style =
                ProgressStyle::with_template("{prefix} {bar:30} {binary_bytes:>10}/{binary_total_bytes:10} {msg}");
            bar.set_style(style.expect("the template is well formed"));
            bar.set_prefix(short(&layer.layer));
            bar
        });
        bar.set_message(layer.state.clone());
        match layer.state.as_str() {
            "present" | "done" => {
                bar.set_position(layer.total);
                bar.abandon();
            }
            _ => bar.set_position(layer.bytes),
        }
    }

    fn clear(&self) {
        let _ = self.all.clear();
    }
}
