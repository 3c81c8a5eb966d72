//! Which server, and with what key.
//!
//! Looked for in this order: the environment (`TENKI_API_ENDPOINT`, `TENKI_API_URL`; `TENKI_AUTH_TOKEN`,
//! `TENKI_API_KEY`), what `nagaya login` wrote, the configuration of Tenki's own command line (read, never written),
//! and the data directory of the server on this machine. A key from a file goes to that file's server and to no other.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use nagaya_client::{Client, ClientOptions};
use serde::Deserialize;

use crate::errors::{Failure, Local};

/// Where the server keeps everything, unless `NAGAYA_DATA_DIR` says otherwise.
const DATA_DIRECTORY: &str = "/var/lib/nagaya";
/// The server that Tenki's own command line talks to.
const TENKI_ENDPOINT: &str = "https://api.tenki.cloud";

/// A client of the server that is meant.
pub fn client() -> Result<Client, Failure> {
    Ok(Client::new(find()?.options)?)
}

/// The server that is meant, and where that was learned from.
pub fn find() -> Result<Found, Failure> {
    let mut found = Places::of_this_process().find(ClientOptions::from_env())?;
    found.options.user_agent = concat!("nagaya-cli/", env!("CARGO_PKG_VERSION")).to_owned();
    if let Some(path) = std::env::var_os("NAGAYA_ROOT_CERTIFICATES").map(PathBuf::from) {
        found.options.root_certificates = Some(fs::read(&path).map_err(|error| Failure::reading(&path, &error))?);
    }
    Ok(found)
}

pub struct Found {
    pub options: ClientOptions,
    /// Where the key was found, for people.
    pub token_from: String,
}

/// What `nagaya login` writes and what Tenki's command line wrote. Unknown keys are other programs' business.
#[derive(Debug, Default, Deserialize)]
struct LoginFile {
    #[serde(default, alias = "api_endpoint", alias = "api_url")]
    endpoint: Option<String>,
    #[serde(default)]
    auth_token: Option<String>,
}

/// A server and its key, as one file has them.
struct Pair {
    endpoint: String,
    token: String,
    from: String,
}

struct Places {
    login: Option<PathBuf>,
    tenki: Option<PathBuf>,
    data_directory: PathBuf,
}

impl Places {
    fn of_this_process() -> Self {
        let data_directory = std::env::var_os("NAGAYA_DATA_DIR").unwrap_or_else(|| DATA_DIRECTORY.into());
        let tenki = configuration_directory().map(|directory| directory.join("tenki/config.yaml"));
        Self { login: login_file(), tenki, data_directory: data_directory.into() }
    }

    fn find(&self, mut options: ClientOptions) -> Result<Found, Failure> {
        if options.token.is_some() {
            if options.endpoint.is_none() {
                options.endpoint = read_word(&self.data_directory.join("address"))?;
            }
            return Ok(Found { options, token_from: "the environment".to_owned() });
        }
        let wanted = options.endpoint.clone();
        let fits = |pair: &Pair| wanted.as_deref().is_none_or(|wanted| same_server(wanted, &pair.endpoint));
        for pair in [self.of_login(), self.of_tenki(), self.of_data_directory()] {
            if let Some(pair) = pair?.filter(fits) {
                options.endpoint.get_or_insert(pair.endpoint);
                options.token = Some(pair.token);
                return Ok(Found { options, token_from: pair.from });
            }
        }
        Err(self.nothing(wanted))
    }

    fn of_login(&self) -> Result<Option<Pair>, Failure> {
        let Some((file, read)) = self.login.as_deref().map(read_login).transpose()?.flatten() else { return Ok(None) };
        let (Some(endpoint), Some(token)) = (read.endpoint, read.auth_token) else { return Ok(None) };
        Ok(Some(Pair { endpoint, token, from: file }))
    }

    fn of_tenki(&self) -> Result<Option<Pair>, Failure> {
        let Some((file, read)) = self.tenki.as_deref().map(read_login).transpose()?.flatten() else { return Ok(None) };
        let Some(token) = read.auth_token.filter(|token| !token.is_empty()) else { return Ok(None) };
        let endpoint = read.endpoint.unwrap_or_else(|| TENKI_ENDPOINT.to_owned());
        Ok(Some(Pair { endpoint, token, from: file }))
    }

    fn of_data_directory(&self) -> Result<Option<Pair>, Failure> {
        let file = self.data_directory.join("api-key");
        let Some(token) = read_word(&file)? else { return Ok(None) };
        let endpoint = read_word(&self.data_directory.join("address"))?;
        // A server that does not run has no address; asking the usual one says best what is wrong.
        let endpoint = endpoint.unwrap_or_else(|| nagaya_client::DEFAULT_ENDPOINT.to_owned());
        Ok(Some(Pair { endpoint, token, from: file.display().to_string() }))
    }

    fn nothing(&self, wanted: Option<String>) -> Failure {
        let looked = [self.login.as_deref(), self.tenki.as_deref(), Some(self.data_directory.as_path())];
        let looked: Vec<_> = looked.into_iter().flatten().map(|path| path.display().to_string()).collect();
        let endpoint = wanted.unwrap_or_else(|| nagaya_client::DEFAULT_ENDPOINT.to_owned());
        let what = format!(
            "there is no key for {endpoint}: neither TENKI_AUTH_TOKEN nor TENKI_API_KEY is set, and nothing fits in {}",
            looked.join(", ")
        );
        let remedy = "Start a server on this machine with `nagaya serve`, or `nagaya login` to another.";
        Failure::new(Local::NoCredential, what, remedy)
    }
}

/// Where `nagaya login` keeps what it was told.
pub fn login_file() -> Option<PathBuf> {
    configuration_directory().map(|directory| directory.join("nagaya/login.yaml"))
}

fn configuration_directory() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")))
}

fn read_login(path: &Path) -> Result<Option<(String, LoginFile)>, Failure> {
    let Some(text) = read(path)? else { return Ok(None) };
    let read = serde_saphyr::from_str(&text).map_err(|_| {
        let what = format!("cannot read {}: it is not a YAML file of the expected form", path.display());
        Failure::new(Local::CannotRead, what, "Mend or remove it; `nagaya login` writes a new one of ours.")
    })?;
    Ok(Some((path.display().to_string(), read)))
}

/// A file of one line; `None` when it is missing or empty.
fn read_word(path: &Path) -> Result<Option<String>, Failure> {
    Ok(read(path)?.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()))
}

fn read(path: &Path) -> Result<Option<String>, Failure> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let what = format!("cannot read {}: permission denied", path.display());
            let remedy = "The server's files are its user's: be that user (often `sudo`) or set TENKI_API_ENDPOINT and \
                 TENKI_API_KEY.";
            Err(Failure::new(Local::NoCredential, what, remedy))
        }
        Err(error) => Err(Failure::reading(path, &error)),
    }
}

/// Whether two addresses mean the same server. All names of this machine are one.
fn same_server(one: &str, other: &str) -> bool {
    let parts = |text: &str| {
        let uri: http::Uri = text.trim().trim_end_matches('/').parse().ok()?;
        let scheme = uri.scheme_str()?.to_lowercase();
        let host = uri.host()?.trim_matches(['[', ']']).to_lowercase();
        let here = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
        Some((scheme, if here { "localhost".to_owned() } else { host }, port))
    };
    parts(one).is_some_and(|one| parts(other) == Some(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Home {
        directory: tempfile::TempDir,
        places: Places,
    }

    fn home(files: &[(&str, &str)]) -> Home {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let at = |name| directory.path().join(name);
        let places =
            Places { login: Some(at("login.yaml")), tenki: Some(at("config.yaml")), data_directory: at("data") };
        Home { directory, places }
    }

    fn found(home: &Home, endpoint: Option<&str>, token: Option<&str>) -> Result<(String, String), u8> {
        let options = ClientOptions::default().endpoint(endpoint.map(str::to_owned)).token(token.map(str::to_owned));
        let found = home.places.find(options).map_err(|failure| failure.exit_code())?;
        Ok((found.options.endpoint.unwrap_or_default(), found.options.token.unwrap_or_default()))
    }

    fn pair(endpoint: &str, token: &str) -> Result<(String, String), u8> {
        Ok((endpoint.to_owned(), token.to_owned()))
    }

    const LOGIN: (&str, &str) = ("login.yaml", "endpoint: https://sandboxes.example\nauth_token: tk_login\n");
    const TENKI: (&str, &str) = ("config.yaml", "auth_token: tk_tenki\ncurrent_workspace_id: w\n");
    const ADDRESS: (&str, &str) = ("data/address", "http://127.0.0.1:4711\n");
    const KEY: (&str, &str) = ("data/api-key", "tk_local\n");

    #[test]
    fn the_environment_goes_first() {
        let home = home(&[LOGIN, TENKI, ADDRESS, KEY]);
        assert_eq!(found(&home, Some("http://x:1"), Some("tk_env")), pair("http://x:1", "tk_env"));
        assert_eq!(found(&home, None, Some("tk_env")), pair("http://127.0.0.1:4711", "tk_env"));
    }

    #[test]
    fn files_follow_in_their_order() {
        assert_eq!(
            found(&home(&[LOGIN, TENKI, ADDRESS, KEY]), None, None),
            pair("https://sandboxes.example", "tk_login")
        );
        assert_eq!(found(&home(&[TENKI, ADDRESS, KEY]), None, None), pair("https://api.tenki.cloud", "tk_tenki"));
        assert_eq!(found(&home(&[ADDRESS, KEY]), None, None), pair("http://127.0.0.1:4711", "tk_local"));
        assert_eq!(found(&home(&[KEY]), None, None), pair("http://127.0.0.1:7070", "tk_local"));
        assert_eq!(found(&home(&[]), None, None), Err(77));
    }

    #[test]
    fn a_key_of_a_file_goes_to_its_own_server_only() {
        let home = home(&[LOGIN, TENKI, ADDRESS, KEY]);
        assert_eq!(found(&home, Some("http://localhost:4711"), None), pair("http://localhost:4711", "tk_local"));
        assert_eq!(found(&home, Some("https://api.tenki.cloud/"), None), pair("https://api.tenki.cloud/", "tk_tenki"));
        assert_eq!(found(&home, Some("https://elsewhere.example"), None), Err(77));
        assert_eq!(found(&home, Some("http://localhost:4712"), None), Err(77));
    }

    #[test]
    fn a_damaged_file_is_named() {
        let home = home(&[("login.yaml", "endpoint: [")]);
        assert_eq!(found(&home, None, None), Err(66));
        assert!(home.directory.path().exists());
    }
}
