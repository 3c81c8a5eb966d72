//! GitOperation: git, run in the sandbox as its user in its home directory.
//!
//! Everything is an argument of git, never of a shell. A value that git would take for an option is refused.

use std::collections::BTreeMap;

use connectrpc::RequestContext;
use nagaya_api::error::{Code, Error};
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::words;
use nagaya_engine::ports::{Command, ExitStatus, Process, ProcessEvent};
use nagaya_engine::{OpenSession, validate};

use super::service::TenkiService;
use crate::rpc::convert;
use crate::rpc::parse::invalid;
use crate::rpc::service::caller;

/// What is answered of git's output; the rest is read and dropped.
const OUTPUT_BYTES_MAX: usize = 2 * 1024 * 1024;
const ERROR_BYTES_MAX: usize = 16 * 1024;
/// What shells answer for a program that is not there, and for one that was killed.
const NOT_INSTALLED: i32 = 127;
const KILLED: i32 = 128;

impl TenkiService {
    pub(super) async fn git_operation(
        &self,
        context: &RequestContext,
        request: wire::GitOperationRequest,
    ) -> Result<wire::GitOperationResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let arguments = arguments(&request.operation, request.args)?;
        let (certificate, _) = self.engine.certificate(caller, id).await?;
        let open = self.engine.open(&certificate.text, id).await?;
        let mut env = open.env.clone();
        // Nobody is there to answer.
        env.insert("GIT_TERMINAL_PROMPT".to_owned(), "0".to_owned());
        let argv = ["git", "--no-pager", "-c", "color.ui=false"].into_iter().map(str::to_owned).chain(arguments);
        let command = Command { argv: argv.collect(), env, ..Command::default() };
        validate::command(&command, self.engine.config())?;
        let output = run(&open, &request.operation, command).await?;
        Ok(wire::GitOperationResponse { output })
    }
}

/// What git is asked to do, without git itself.
fn arguments(operation: &str, given: BTreeMap<String, String>) -> Result<Vec<String>, Error> {
    let mut given = Given(given);
    let mut arguments = vec![operation.to_owned()];
    let mut paths = Vec::new();
    match operation {
        "clone" => {
            if let Some(depth) = given.number("depth")? {
                arguments.push(format!("--depth={depth}"));
            }
            if let Some(branch) = given.value("branch")? {
                arguments.push(format!("--branch={branch}"));
            }
            paths.push(given.required("repo")?);
            paths.extend(given.value("directory")?);
        }
        "checkout" => {
            match given.0.remove("create").as_deref() {
                Some("true") => arguments.push("-b".to_owned()),
                None | Some("" | "false") => {}
                Some(_) => return Err(invalid("args.create must be true or false")),
            }
            arguments.push(given.required("ref")?);
        }
        "diff" => {
            for key in ["range", "base", "head"] {
                arguments.extend(given.value(key)?);
            }
            paths.extend(given.value("path")?);
        }
        "log" => {
            if let Some(count) = given.number("max_count")? {
                arguments.push(format!("--max-count={count}"));
            }
            arguments.extend(given.value("range")?);
            paths.extend(given.value("path")?);
        }
        _ => return Err(invalid("operation must be clone, checkout, diff or log")),
    }
    if !given.0.is_empty() {
        return Err(invalid("args has a key that this operation does not know"));
    }
    if !paths.is_empty() {
        arguments.push("--".to_owned());
        arguments.extend(paths);
    }
    Ok(arguments)
}

/// The arguments that a caller gave; each is taken out when it is read.
struct Given(BTreeMap<String, String>);

impl Given {
    /// `None` when it is absent or empty.
    fn value(&mut self, key: &str) -> Result<Option<String>, Error> {
        let value = self.0.remove(key).filter(|value| !value.is_empty());
        match &value {
            Some(value) if value.starts_with('-') => Err(invalid(&format!("args.{key} must not begin with '-'"))),
            _ => Ok(value),
        }
    }

    fn required(&mut self, key: &str) -> Result<String, Error> {
        self.value(key)?.ok_or_else(|| invalid(&format!("args.{key} must not be empty")))
    }

    fn number(&mut self, key: &str) -> Result<Option<u32>, Error> {
        let number = |text: String| text.parse().map_err(|_| invalid(&format!("args.{key} must be a number")));
        self.value(key)?.map(number).transpose()
    }
}

/// Runs git to its end. Dropping the future ends it.
async fn run(open: &OpenSession, operation: &str, command: Command) -> Result<String, Error> {
    let execution = open.commands.new_execution();
    let process = match open.guest.run(command).await {
        Ok(process) => process,
        Err(error) => {
            open.commands.not_started(execution, "git", &error).await;
            return Err(match error.code {
                Code::CommandNotFound => {
                    let reason = "git is not installed in the sandbox; install it first, e.g. with apt-get install git";
                    failure(operation, NOT_INSTALLED, reason)
                }
                code => Error::new(code, error.detail),
            });
        }
    };
    let Outcome { stdout, stderr, status } = outcome(process).await?;
    open.commands.ended(execution, "git", &status).await;
    if status.code == 0 {
        // Of what changes only the work tree git tells on its standard error.
        return Ok(if stdout.bytes.is_empty() { stderr.text() } else { stdout.text() });
    }
    match status.signal.as_str() {
        "" => {
            let said = stderr.text();
            let failure = failure(operation, status.code, &said);
            if words::is_cut(&failure) {
                open.commands.git_failed(execution, operation, status.code, said.trim()).await;
            }
            Err(failure)
        }
        signal => Err(failure(operation, KILLED, &format!("git was ended by {signal}"))),
    }
}

/// A failure in the one shape that clients read the exit status and git's words out of.
fn failure(operation: &str, exit_code: i32, said: &str) -> Error {
    let shape = format!("git {operation} failed (exit_code={exit_code}); check the repository, ref and access token:");
    let error = Error::new(Code::GitFailed, format!("{shape} {}", said.trim()));
    // Words that clients would take for something else are left out; the exit status is not.
    match words::wire_text(&error).starts_with(&shape) {
        true => error,
        false => Error::new(Code::GitFailed, format!("{shape} git's message is left out here; run git with a command")),
    }
}

struct Outcome {
    stdout: Output,
    stderr: Output,
    status: ExitStatus,
}

/// The beginning of an output.
struct Output {
    bytes: Vec<u8>,
    bytes_max: usize,
    cut: bool,
}

impl Output {
    fn new(bytes_max: usize) -> Self {
        Self { bytes: Vec::new(), bytes_max, cut: false }
    }

    fn push(&mut self, more: &[u8]) {
        let room = self.bytes_max - self.bytes.len();
        self.bytes.extend_from_slice(&more[..more.len().min(room)]);
        self.cut |= more.len() > room;
    }

    fn text(&self) -> String {
        let mut text = String::from_utf8_lossy(&self.bytes).into_owned();
        if self.cut {
            text.push_str(&format!("\n[cut after {} bytes]\n", self.bytes_max));
        }
        text
    }
}

async fn outcome(mut process: Process) -> Result<Outcome, Error> {
    let (mut stdout, mut stderr) = (Output::new(OUTPUT_BYTES_MAX), Output::new(ERROR_BYTES_MAX));
    while let Some(event) = process.events.recv().await {
        match event {
            ProcessEvent::Stdout(bytes) => stdout.push(&bytes),
            ProcessEvent::Stderr(bytes) => stderr.push(&bytes),
            ProcessEvent::Exit(status) => return Ok(Outcome { stdout, stderr, status }),
        }
    }
    Err(Error::new(Code::GuestUnreachable, "the connection to the command was lost"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(operation: &str, given: &[(&str, &str)]) -> Result<String, Error> {
        let given = given.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        arguments(operation, given).map(|arguments| arguments.join(" "))
    }

    #[test]
    fn operations_become_arguments_of_git() {
        for (operation, given, expected) in [
            ("clone", vec![("repo", "https://a/b")], "clone -- https://a/b"),
            (
                "clone",
                vec![("repo", "r"), ("branch", "main"), ("depth", "1"), ("directory", "d")],
                "clone --depth=1 --branch=main -- r d",
            ),
            ("checkout", vec![("ref", "v1")], "checkout v1"),
            ("checkout", vec![("ref", "new"), ("create", "true")], "checkout -b new"),
            ("diff", vec![], "diff"),
            ("diff", vec![("range", "a..b"), ("path", "src")], "diff a..b -- src"),
            ("diff", vec![("head", "b"), ("base", "a"), ("range", "")], "diff a b"),
            ("log", vec![("max_count", "3"), ("range", "a..b"), ("path", "p")], "log --max-count=3 a..b -- p"),
        ] {
            assert_eq!(asked(operation, &given).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn what_git_would_take_for_an_option_is_refused() {
        for (operation, key) in [
            ("clone", "repo"),
            ("clone", "branch"),
            ("clone", "directory"),
            ("clone", "depth"),
            ("checkout", "ref"),
            ("diff", "range"),
            ("diff", "base"),
            ("diff", "head"),
            ("diff", "path"),
            ("log", "range"),
            ("log", "max_count"),
        ] {
            let refused = asked(
                operation,
                &[("repo", "r"), (key, "--upload-pack=x")][usize::from(key == "repo" || operation != "clone")..],
            );
            let refused = refused.unwrap_err();
            assert_eq!(refused.code, Code::InvalidArgument, "{operation} {key}");
            assert!(refused.detail.contains(key), "{refused}");
        }
    }

    #[test]
    fn unknown_operations_keys_and_values_are_refused() {
        for (operation, given) in [
            ("push", vec![]),
            ("", vec![]),
            ("clone", vec![]),
            ("clone", vec![("repo", "")]),
            ("clone", vec![("repo", "r"), ("depth", "many")]),
            ("clone", vec![("repo", "r"), ("force", "true")]),
            ("checkout", vec![("create", "true")]),
            ("checkout", vec![("ref", "r"), ("create", "yes")]),
            ("log", vec![("max_count", "1.5")]),
        ] {
            assert_eq!(asked(operation, &given).map_err(|error| error.code), Err(Code::InvalidArgument), "{given:?}");
        }
    }

    #[test]
    fn a_failure_has_the_shape_that_clients_read() {
        let told = words::wire_text(&failure("clone", 128, "fatal: repository 'x' not found\n"));
        let shape = "git clone failed (exit_code=128); check the repository, ref and access token: ";
        assert_eq!(told, format!("{shape}fatal: repository 'x' not found [git_failed]"));
        let hidden = words::wire_text(&failure("clone", 1, "the connection was terminated"));
        assert!(
            hidden.starts_with("git clone failed (exit_code=1); check") && !hidden.contains("terminated"),
            "{hidden}"
        );
    }

    #[test]
    fn long_outputs_are_cut_and_say_so() {
        let mut output = Output::new(4);
        output.push(b"abc");
        output.push(b"");
        assert_eq!(output.text(), "abc");
        output.push(b"d");
        assert_eq!(output.text(), "abcd");
        output.push(b"e");
        assert_eq!(output.text(), "abcd\n[cut after 4 bytes]\n");
    }
}
