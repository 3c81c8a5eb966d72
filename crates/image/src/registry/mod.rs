//! Asks registries for manifests and blobs, over the distribution API. Everything a registry says is a stranger's word.

mod address;
mod auth;
mod credentials;
mod http;

use std::time::{Duration, SystemTime};

use ::http::header::{
    ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE, RETRY_AFTER,
};
use ::http::{HeaderMap, HeaderValue, Method, StatusCode};
use bytes::Bytes;

use crate::config::Config;
use crate::digest::Digest;
use crate::error::ImageError;
use crate::manifest::{DOCKER_INDEX, DOCKER_MANIFEST, DOCUMENT_BYTES_MAX, OCI_INDEX, OCI_MANIFEST};
use crate::reference::{DOCKER_HUB, Reference};

use auth::Challenge;
use credentials::Credentials;
use http::{Answer, Body, Failure, Http, Target};

const DOCKER_HUB_HOST: &str = "registry-1.docker.io";
const REDIRECTS_MAX: u32 = 5;
/// How often one blob may be gone on with, however much of it arrived in between.
const RESUMES_MAX: u32 = 100;

/// Knows how to reach registries.
pub(crate) struct Client {
    http: Http,
}

impl Client {
    pub fn new(config: &Config) -> Result<Self, ImageError> {
        Ok(Self { http: Http::new(config)? })
    }

    /// Prepares to pull from one repository.
    pub async fn session(&self, reference: &Reference) -> Result<Session<'_>, ImageError> {
        let registry = reference.registry();
        if !self.http.config.is_allowed(registry) {
            return Err(ImageError::RegistryNotAllowed { registry: registry.into() });
        }
        let credentials = credentials::find(self.http.config.docker_config.as_deref(), registry).await?;
        let scheme = if self.http.config.is_insecure(registry) { "http" } else { "https" };
        let host = if registry == DOCKER_HUB { DOCKER_HUB_HOST } else { registry };
        let base = Target::parse(&format!("{scheme}://{host}/"))
            .map_err(|problem| ImageError::InvalidAnswer { host: host.into(), problem })?;
        Ok(Session {
            http: &self.http,
            registry: registry.to_owned(),
            repository: reference.repository().to_owned(),
            base,
            credentials,
            authorization: tokio::sync::Mutex::new(None),
        })
    }
}

/// Pulls from one repository, and knows the token for that.
pub(crate) struct Session<'a> {
    http: &'a Http,
    registry: String,
    repository: String,
    base: Target,
    credentials: Option<Credentials>,
    authorization: tokio::sync::Mutex<Option<HeaderValue>>,
}

/// A manifest or index, not yet believed.
pub(crate) struct Fetched {
    pub bytes: Vec<u8>,
    pub media_type: String,
}

/// Counts attempts, and waits between them.
struct Attempts {
    made: u32,
    most: u32,
}

impl Session<'_> {
    /// A manifest or index by tag or digest.
    pub async fn manifest(&self, version: &str) -> Result<Fetched, ImageError> {
        let what = format!("{}:{version}", self.repository);
        let accepted = [OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST].join(", ");
        let accepted = HeaderValue::from_str(&accepted).map_err(|_| self.odd("media types".into()))?;
        let path = format!("/v2/{}/manifests/{version}", self.repository);
        self.document(&path, &what, HeaderMap::from_iter([(ACCEPT, accepted)])).await
    }

    /// A small blob; its digest is for the caller to verify.
    pub async fn document_blob(&self, digest: &Digest) -> Result<Vec<u8>, ImageError> {
        let path = format!("/v2/{}/blobs/{digest}", self.repository);
        Ok(self.document(&path, &format!("{}@{digest}", self.repository), HeaderMap::new()).await?.bytes)
    }

    async fn document(&self, path: &str, what: &str, headers: HeaderMap) -> Result<Fetched, ImageError> {
        let mut attempts = self.attempts();
        loop {
            let mut answer = self.get(path, what, headers.clone(), &mut attempts).await?;
            match answer.body.all(DOCUMENT_BYTES_MAX).await {
                Ok(Some(bytes)) => {
                    let media_type = answer.header(CONTENT_TYPE).unwrap_or_default().to_owned();
                    return Ok(Fetched { bytes, media_type });
                }
                Ok(None) => return Err(self.odd(format!("{what} has more than {DOCUMENT_BYTES_MAX} bytes"))),
                Err(problem) => attempts.again(self, what, &problem, None).await?,
            }
        }
    }

    /// A blob of this many bytes, piece by piece.
    pub fn blob(&self, digest: Digest, bytes: u64) -> BlobStream<'_> {
        BlobStream {
            session: self,
            digest,
            what: format!("{}@{digest}", self.repository),
            at: 0,
            bytes,
            body: None,
            skip: 0,
            resumes: 0,
            attempts: self.attempts(),
        }
    }

    fn attempts(&self) -> Attempts {
        Attempts { made: 0, most: self.http.config.retries_max + 1 }
    }

    fn odd(&self, problem: String) -> ImageError {
        ImageError::InvalidAnswer { host: self.registry.clone(), problem }
    }

    /// Asks until there is an answer with content.
    async fn get(
        &self,
        path: &str,
        what: &str,
        headers: HeaderMap,
        attempts: &mut Attempts,
    ) -> Result<Answer, ImageError> {
        let mut logged_in = false;
        loop {
            let used = self.authorization.lock().await.clone();
            let outcome = self.follow(path, headers.clone(), used.as_ref()).await;
            let answer = match outcome {
                Ok(answer) => answer,
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(problem)) => {
                    attempts.again(self, what, &problem, None).await?;
                    continue;
                }
            };
            let unauthorized = |problem: &str| ImageError::Unauthorized {
                registry: self.registry.clone(),
                what: what.into(),
                problem: problem.into(),
            };
            match answer.status {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(answer),
                StatusCode::UNAUTHORIZED if !logged_in => {
                    let challenge = Challenge::find(&answer.headers);
                    let challenge = challenge.ok_or_else(|| unauthorized("it does not say how to log in"))?;
                    match self.log_in(&challenge, used).await {
                        Ok(()) => logged_in = true,
                        Err(Failure::Final(error)) => return Err(error),
                        Err(Failure::Passing(problem)) => attempts.again(self, what, &problem, None).await?,
                    }
                }
                StatusCode::UNAUTHORIZED => return Err(unauthorized("the login does not reach that far")),
                StatusCode::FORBIDDEN => return Err(unauthorized("it is forbidden")),
                StatusCode::NOT_FOUND | StatusCode::GONE => {
                    return Err(ImageError::NotAtRegistry { registry: self.registry.clone(), what: what.into() });
                }
                status @ (StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT) => {
                    attempts.again(self, what, &format!("it answered {status}"), Some(&answer)).await?;
                }
                status if status.is_server_error() => {
                    attempts.again(self, what, &format!("it answered {status}"), Some(&answer)).await?;
                }
                status => return Err(self.odd(format!("it answered {status} when asked for {what}"))),
            }
        }
    }

    /// Gets a new token, unless somebody else did since `used` was taken.
    async fn log_in(&self, challenge: &Challenge, used: Option<HeaderValue>) -> Result<(), Failure> {
        let mut authorization = self.authorization.lock().await;
        if *authorization == used {
            let credentials = self.credentials.as_ref();
            let answer = auth::answer(self.http, challenge, credentials, &self.registry, &self.repository).await?;
            *authorization = Some(answer);
        }
        Ok(())
    }

    /// Sends one request, and goes where it is sent. Who asks is told to the registry alone.
    async fn follow(
        &self,
        path: &str,
        headers: HeaderMap,
        authorization: Option<&HeaderValue>,
    ) -> Result<Answer, Failure> {
        let mut target = Target { path: path.to_owned(), ..self.base.clone() };
        for _ in 0..=REDIRECTS_MAX {
            let mut headers = headers.clone();
            if let Some(authorization) = authorization.filter(|_| target.origin() == self.base.origin()) {
                headers.insert(AUTHORIZATION, authorization.clone());
            }
            let answer = self.http.send(Method::GET, &target, headers, Bytes::new()).await?;
            if !matches!(answer.status.as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(answer);
            }
            let location = answer.header(LOCATION).unwrap_or_default().to_owned();
            let refused = |problem: String| ImageError::RefusedRedirect {
                host: target.authority(),
                // A query is often the key to the content.
                target: location.split('?').next().unwrap_or_default().chars().take(200).collect(),
                problem,
            };
            let next = target.join(&location).map_err(&refused)?;
            if target.https && !next.https {
                return Err(refused("it leads from https to http".into()).into());
            }
            target = next;
        }
        let problem = format!("it is the redirect number {}, and {REDIRECTS_MAX} are followed", REDIRECTS_MAX + 1);
        Err(ImageError::RefusedRedirect { host: self.registry.clone(), target: target.origin(), problem }.into())
    }
}

impl Attempts {
    /// Waits for the next attempt, as long as the answer asks for where there was one that did; gives up when there were enough.
    async fn again(
        &mut self,
        session: &Session<'_>,
        what: &str,
        problem: &str,
        answer: Option<&Answer>,
    ) -> Result<(), ImageError> {
        let config = &session.http.config;
        let asked = answer.and_then(|answer| answer.header(RETRY_AFTER)).and_then(seconds);
        let limited = answer.is_some_and(|answer| answer.status == StatusCode::TOO_MANY_REQUESTS);
        let too_long = asked.is_some_and(|asked| asked.as_millis() > u128::from(config.retry_after_ms_max));
        self.made += 1;
        if self.made >= self.most || too_long {
            let registry = session.registry.clone();
            return Err(match limited {
                true => {
                    let when = asked.map_or("later".into(), |asked| format!("in {} s", asked.as_secs()));
                    ImageError::RateLimited { registry, when }
                }
                false => ImageError::Unreachable {
                    host: registry,
                    what: what.into(),
                    problem: problem.into(),
                    attempts: self.made,
                },
            });
        }
        tracing::debug!(what, problem, attempt = self.made, "a request to a registry is repeated");
        tokio::time::sleep(asked.unwrap_or_else(|| config.delay(self.made - 1))).await;
        Ok(())
    }
}

/// `Retry-After`: a number of seconds, or a date.
fn seconds(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = date(text.trim())?;
    Some(at.duration_since(SystemTime::now()).unwrap_or_default())
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`, the one form that is still written.
fn date(text: &str) -> Option<SystemTime> {
    let rest = text.split_once(", ")?.1;
    let parts: Vec<_> = rest.split([' ', ':']).collect();
    let [day, month, year, hour, minute, second, "GMT"] = parts[..] else { return None };
    let number = |text: &str| text.parse::<u64>().ok();
    let (day, year) = (number(day)?, number(year)?);
    let (hour, minute, second) = (number(hour)?, number(minute)?, number(second)?);
    let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let month = months.iter().position(|name| *name == month)? as u64 + 1;
    if !(1970..3000).contains(&year) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days since the era's beginning, with years that begin in March.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    let days = days.checked_sub(719_468)?;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(days * 86_400 + hour * 3600 + minute * 60 + second))
}

/// A blob that arrives in pieces. A connection that breaks is made anew, and goes on where it broke.
pub(crate) struct BlobStream<'a> {
    session: &'a Session<'a>,
    digest: Digest,
    what: String,
    at: u64,
    bytes: u64,
    body: Option<Body>,
    /// Of the body: what is here already, where a registry began anew.
    skip: u64,
    resumes: u32,
    attempts: Attempts,
}

impl BlobStream<'_> {
    /// The next piece; `None` when all bytes were given.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ImageError> {
        loop {
            if self.at == self.bytes {
                self.body = None;
                return Ok(None);
            }
            let mut body = match self.body.take() {
                Some(body) => body,
                None => self.begin().await?,
            };
            let problem = match body.next().await {
                Ok(Some(mut piece)) => {
                    let skipped = self.skip.min(piece.len() as u64);
                    self.skip -= skipped;
                    bytes::Buf::advance(&mut piece, skipped as usize);
                    if piece.len() as u64 > self.bytes - self.at {
                        return Err(self.session.odd(format!("{} has more than its {} bytes", self.what, self.bytes)));
                    }
                    self.body = Some(body);
                    if piece.is_empty() {
                        continue;
                    }
                    self.at += piece.len() as u64;
                    self.attempts = self.session.attempts();
                    return Ok(Some(piece));
                }
                Ok(None) => format!("it ended after {} of {} bytes", self.at, self.bytes),
                Err(problem) => problem,
            };
            drop(body);
            self.resumes += 1;
            if self.resumes > RESUMES_MAX {
                self.attempts.made = self.attempts.most;
            }
            self.attempts.again(self.session, &self.what, &problem, None).await?;
        }
    }

    async fn begin(&mut self) -> Result<Body, ImageError> {
        let path = format!("/v2/{}/blobs/{}", self.session.repository, self.digest);
        let mut headers = HeaderMap::new();
        if self.at > 0 {
            let range = HeaderValue::from_str(&format!("bytes={}-", self.at));
            headers.insert(RANGE, range.map_err(|_| self.session.odd("a range".into()))?);
        }
        let answer = self.session.get(&path, &self.what, headers, &mut self.attempts).await?;
        let odd = |problem: String| Err(self.session.odd(format!("{} {problem}", self.what)));
        self.skip = 0;
        if answer.status == StatusCode::PARTIAL_CONTENT {
            let range = answer.header(CONTENT_RANGE).unwrap_or_default();
            let from = range.strip_prefix("bytes ").and_then(|range| range.split('-').next()?.trim().parse().ok());
            if from != Some(self.at) {
                return odd(format!("was to go on at {}, and came with the range {range:?}", self.at));
            }
        } else {
            self.skip = self.at;
            let length = answer.header(CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
            if let Some(length) = length.filter(|length| *length != self.bytes) {
                return odd(format!("has {length} bytes, not {} as its manifest says", self.bytes));
            }
        }
        Ok(answer.body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_to_wait_is_read_in_both_forms() {
        assert_eq!(seconds("7"), Some(Duration::from_secs(7)));
        let date_of = |text| date(text).map(|at| at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs());
        assert_eq!(date_of("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(date_of("Thu, 29 Feb 2024 00:00:00 GMT"), Some(1_709_164_800));
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        for refused in ["", "soon", "-1", "Sun, 06 Nox 1994 08:49:37 GMT", "Sun, 06 Nov 0000 08:49:37 GMT", "Sun, x"] {
            assert_eq!(seconds(refused), None, "{refused}");
        }
    }
}
