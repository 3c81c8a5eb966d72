//! git in a sandbox.

use std::collections::BTreeMap;

use nagaya_api::tenki::v1;

use crate::settable::settable;
use crate::{Error, Output, Result, Session};

/// git, run in a session's sandbox by its user. The sandbox needs a `git`.
#[derive(Debug, Clone)]
pub struct Git {
    session: Session,
}

settable! {
    #[derive(Debug, Clone, Default)]
    pub struct CloneOptions {
        pub branch: Option<String>,
        /// The last commits only.
        pub depth: Option<u32>,
        /// Where to; the repository's name by default.
        pub directory: Option<String>,
    }
}

settable! {
    #[derive(Debug, Clone, Default)]
    pub struct DiffOptions {
        /// Such as `main..topic`.
        pub range: Option<String>,
        pub base: Option<String>,
        pub head: Option<String>,
        pub path: Option<String>,
    }
}

settable! {
    #[derive(Debug, Clone, Default)]
    pub struct LogOptions {
        pub max_count: Option<u32>,
        pub range: Option<String>,
        pub path: Option<String>,
    }
}

settable! {
    #[derive(Debug, Clone, Default)]
    pub struct FetchPrOptions {
        /// `origin` by default.
        pub remote: Option<String>,
        /// The repository; the home directory by default.
        pub directory: Option<String>,
        /// The branch is this, a hyphen and the number; `pr` by default.
        pub branch_prefix: Option<String>,
    }
}

impl Session {
    pub fn git(&self) -> Git {
        Git { session: self.clone() }
    }
}

impl Git {
    /// Clones a repository. Fails, as the others do, with [`Error::GitFailed`].
    pub async fn clone_repository(&self, repository: &str, options: CloneOptions) -> Result<String> {
        let arguments = [
            ("repo", Some(repository.to_owned())),
            ("branch", options.branch),
            ("depth", options.depth.map(|depth| depth.to_string())),
            ("directory", options.directory),
        ];
        self.operation("clone", arguments).await
    }

    /// Checks out a branch, tag or commit; makes the branch if told so.
    pub async fn checkout(&self, reference: &str, create: bool) -> Result<String> {
        let create = create.then(|| "true".to_owned());
        self.operation("checkout", [("ref", Some(reference.to_owned())), ("create", create)]).await
    }

    pub async fn diff(&self, options: DiffOptions) -> Result<String> {
        let arguments =
            [("range", options.range), ("base", options.base), ("head", options.head), ("path", options.path)];
        self.operation("diff", arguments).await
    }

    pub async fn log(&self, options: LogOptions) -> Result<String> {
        let max_count = options.max_count.map(|count| count.to_string());
        self.operation("log", [("max_count", max_count), ("range", options.range), ("path", options.path)]).await
    }

    /// Fetches a pull request of a forge that offers them as `pull/NUMBER/head`, and checks it out.
    /// Answers the name of its branch.
    pub async fn fetch_pr(&self, number: u64, options: FetchPrOptions) -> Result<String> {
        let branch = format!("{}-{number}", options.branch_prefix.as_deref().unwrap_or("pr"));
        let remote = options.remote.as_deref().unwrap_or("origin");
        for (option, value) in [("remote", remote), ("branch_prefix", branch.as_str())] {
            if value.starts_with('-') {
                return Err(Error::InvalidOptions(format!("{option} must not begin with a hyphen")));
            }
        }
        let refspec = format!("pull/{number}/head:{branch}");
        let steps: [(&str, Vec<&str>); 2] =
            [("fetch PR", vec!["fetch", remote, &refspec]), ("checkout PR", vec!["checkout", &branch])];
        for (step, arguments) in steps {
            let mut argv = vec!["git"];
            if let Some(directory) = &options.directory {
                argv.extend(["-C", directory]);
            }
            argv.extend(arguments);
            let output = self.session.command(argv).output().await?;
            if !output.is_success() {
                return Err(step_failed(step, &output));
            }
        }
        Ok(branch)
    }

    async fn operation<const N: usize>(
        &self,
        operation: &str,
        arguments: [(&str, Option<String>); N],
    ) -> Result<String> {
        let given = arguments.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
        let request = v1::GitOperationRequest {
            session_id: self.session.id().to_owned(),
            operation: operation.to_owned(),
            args: given.collect::<BTreeMap<_, _>>(),
        };
        Ok(self.session.client().control().git_operation(request).await.map_err(Error::of_rpc)?.output)
    }
}

fn step_failed(step: &str, output: &Output) -> Error {
    let stderr = output.stderr_text();
    let stderr = stderr.trim();
    let status = output.status;
    let message = format!("git {step} failed (status={status} exit_code={}): {stderr}", output.exit_code);
    Error::GitFailed {
        message,
        exit_code: Some(output.exit_code),
        transient: is_transient(stderr),
        stderr: Some(stderr.to_owned()),
    }
}

/// The words of servers before what git said.
const STDERR: &str = "; check the repository, ref and access token: ";
const EXIT_CODE: &str = "failed (exit_code=";

/// The failure of git that a refusal tells of, if it does.
pub(crate) fn failure(message: &str) -> Option<Error> {
    let (before, after) = message.split_once(EXIT_CODE)?;
    if !before.to_lowercase().contains("git ") {
        return None;
    }
    let exit_code = after.split_once(')').and_then(|(number, _)| number.parse().ok());
    let stderr = message.split_once(STDERR).map(|(_, stderr)| {
        // The code at the end is the server's, not git's.
        let stderr = stderr.strip_suffix(']').and_then(|text| text.rsplit_once(" [")).map_or(stderr, |(text, _)| text);
        stderr.trim().to_owned()
    });
    let transient = is_transient(stderr.as_deref().unwrap_or(message));
    Some(Error::GitFailed { message: message.to_owned(), exit_code, stderr, transient })
}

/// Whether git names a cause of the network, and none that stays.
fn is_transient(text: &str) -> bool {
    const TRANSIENT: [&str; 13] = [
        "recv failure",
        "connection reset by peer",
        "could not resolve host",
        "failed to connect",
        "connection timed out",
        "tls",
        "gnutls_handshake",
        "ssl_error",
        "rpc failed",
        "http 5",
        "early eof",
        "remote end hung up unexpectedly",
        "unexpected disconnect",
    ];
    const LASTING: [&str; 9] = [
        "authentication failed",
        "could not read username",
        "terminal prompts disabled",
        "repository not found",
        "permission denied",
        "invalid credentials",
        "pathspec",
        "did not match any",
        "does not appear to be a git repository",
    ];
    let text = text.to_lowercase();
    let word = |wanted: &str| text.split(|each: char| !each.is_ascii_alphanumeric()).any(|word| word == wanted);
    let has = |words: &&str| text.contains(words);
    let lasting = LASTING.iter().any(has)
        || word("403")
        || text.lines().any(|line| line.contains("fatal: repository ") && line.contains(" not found"));
    !lasting && (TRANSIENT.iter().any(has) || word("429") || word("503"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(message: &str) -> Option<(Option<i32>, Option<String>, bool)> {
        match failure(message)? {
            Error::GitFailed { exit_code, stderr, transient, .. } => Some((exit_code, stderr, transient)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn failures_of_git_are_understood() {
        let cloned = "git clone failed (exit_code=128); check the repository, ref and access token: \
                      fatal: unable to access: Could not resolve host: a [git_failed]";
        let stderr = "fatal: unable to access: Could not resolve host: a".to_owned();
        assert_eq!(of(cloned), Some((Some(128), Some(stderr), true)));
        assert_eq!(of("git log failed (exit_code=x)"), Some((None, None, false)));
        assert_eq!(of("tar failed (exit_code=1)"), None);
        assert_eq!(of("git is missing"), None);
    }

    #[test]
    fn only_troubles_of_the_network_may_pass() {
        for passing in ["early EOF", "error: RPC failed; HTTP 502", "HTTP 429 slow down", "Connection timed out"] {
            assert!(is_transient(passing), "{passing}");
        }
        for lasting in [
            "fatal: Authentication failed for x",
            "fatal: repository 'https://a/b' not found; early EOF",
            "HTTP 403 early EOF",
            "error: pathspec 'x' did not match any",
            "42900",
            "",
        ] {
            assert!(!is_transient(lasting), "{lasting}");
        }
    }
}
