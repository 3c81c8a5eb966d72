//! A registry on loopback that does what a test tells it, however odd.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nagaya_image::{Config, Digest};

use crate::images::{Made, OCI_INDEX, OCI_MANIFEST, quick};

#[derive(Debug, Clone, Default)]
pub struct Request {
    pub path: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Request {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// Where a range begins that was asked for.
    pub fn from(&self) -> usize {
        let range = self.header("range").strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
        range.map_or(0, |from| from.parse().unwrap())
    }
}

#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// So much of the body is sent, and then the connection breaks.
    pub breaks_after: Option<usize>,
    /// Nothing is sent, and the connection stays.
    pub hangs: bool,
    /// The length that is announced, if it is not the body's.
    pub announced: Option<usize>,
}

impl Answer {
    pub fn status(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    pub fn ok(body: &[u8]) -> Self {
        Self { status: 200, body: body.to_vec(), ..Self::default() }
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn redirect(to: impl Into<String>) -> Self {
        Self::status(307).header("Location", to)
    }
}

type Handler = Arc<dyn Fn(&Request) -> Answer + Send + Sync>;

pub struct Fake {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Fake {
    /// Serves each connection on a thread of its own until the test's process ends.
    pub fn start(handler: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::over(None, handler)
    }

    /// The same over TLS.
    pub fn over(
        tls: Option<Arc<rustls::ServerConfig>>,
        handler: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (noted, handler): (_, Handler) = (requests.clone(), Arc::new(handler));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (noted, handler, tls) = (noted.clone(), handler.clone(), tls.clone());
                let stream = stream.unwrap();
                std::thread::spawn(move || match tls {
                    None => serve(stream.try_clone().unwrap(), &stream, &handler, &noted),
                    Some(tls) => {
                        let connection = rustls::ServerConnection::new(tls).unwrap();
                        let secure = rustls::StreamOwned::new(connection, stream.try_clone().unwrap());
                        serve(secure, &stream, &handler, &noted);
                    }
                });
            }
        });
        Self { address, requests }
    }

    /// A registry that has this image under every tag, and does otherwise where `odd` has an answer.
    pub fn of(made: &Made, odd: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static) -> Self {
        let made = made.clone();
        Self::start(move |request| odd(request).unwrap_or_else(|| honest(&made, request)))
    }

    pub fn name(&self) -> String {
        self.address.to_string()
    }

    /// Settings with which it may be spoken to.
    pub fn config(&self) -> Config {
        Config { registries_insecure: vec![self.name()], ..quick() }
    }

    pub fn reference(&self, rest: &str) -> nagaya_image::Reference {
        format!("{}/{rest}", self.name()).parse().unwrap()
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// Those whose path has this in it.
    pub fn asked(&self, part: &str) -> Vec<Request> {
        self.requests().into_iter().filter(|request| request.path.contains(part)).collect()
    }
}

/// What a good registry answers.
pub fn honest(made: &Made, request: &Request) -> Answer {
    let (kind, version) = request.path.rsplit_once('/').unwrap_or_default();
    if kind.ends_with("/manifests") {
        return match version.parse::<Digest>() {
            Ok(digest) if digest == made.digest() => Answer::ok(&made.manifest).header("Content-Type", OCI_MANIFEST),
            Ok(digest) if digest == Digest::of(&made.index()) => {
                Answer::ok(&made.index()).header("Content-Type", OCI_INDEX)
            }
            Ok(_) => Answer::status(404),
            Err(_) if version == "index" => Answer::ok(&made.index()).header("Content-Type", OCI_INDEX),
            Err(_) => Answer::ok(&made.manifest).header("Content-Type", OCI_MANIFEST),
        };
    }
    let blob = version.parse::<Digest>().ok().and_then(|digest| made.blobs.get(&digest));
    let Some(bytes) = blob else { return Answer::status(404) };
    match request.from() {
        0 => Answer::ok(bytes),
        from => {
            let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
            Answer { status: 206, ..Answer::ok(&bytes[from..]) }.header("Content-Range", range)
        }
    }
}

fn serve(stream: impl Read + Write, socket: &TcpStream, handler: &Handler, noted: &Mutex<Vec<Request>>) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let path = line.split(' ').nth(1).unwrap().to_owned();
    let mut request = Request { path, ..Request::default() };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        request.headers.insert(name.to_lowercase(), value.to_owned());
    }
    let mut body = vec![0; request.header("content-length").parse().unwrap_or(0)];
    reader.read_exact(&mut body).unwrap();
    request.body = String::from_utf8(body).unwrap();
    noted.lock().unwrap().push(request.clone());
    let answer = handler(&request);
    if answer.hangs {
        // Until the other end has had enough.
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let _ = reader.read(&mut [0]);
        return;
    }
    let length = answer.announced.unwrap_or(answer.body.len());
    let mut head = format!("HTTP/1.1 {} Told\r\nContent-Length: {length}\r\nConnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let sent = answer.breaks_after.unwrap_or(answer.body.len());
    let stream = reader.get_mut();
    let _ = stream.write_all(format!("{head}\r\n").as_bytes());
    let _ = stream.write_all(&answer.body[..sent]);
    let _ = stream.flush();
    if answer.breaks_after.is_none() {
        let _ = reader.read(&mut [0]);
    }
    let _ = socket.shutdown(Shutdown::Both);
}
