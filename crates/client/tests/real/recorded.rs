use std::time::Duration;

use nagaya_client::{CloneOptions, DiffOptions, Error, FetchPrOptions, LogOptions, Session, Wait};

use crate::world::{World, say, small};

crate::cases!(
    what_happened_is_told,
    what_happens_is_told,
    a_session_is_explained,
    commands_have_ids,
    git_works_in_the_sandbox,
    failures_of_git_are_typed,
);

async fn kinds(session: &Session) -> Vec<String> {
    session.events(0).await.unwrap().into_iter().map(|event| event.kind).collect()
}

async fn what_happened_is_told(world: &World) {
    let options = small().max_duration(Some(Duration::from_secs(600)));
    let session = world.client.create(options).await.unwrap();
    session.extend(Duration::from_secs(60)).await.unwrap();
    session.pause().await.unwrap();
    session.resume().await.unwrap();
    session.wait_resumed(Duration::from_secs(60)).await.unwrap();
    session.close().await.unwrap();
    let kinds = kinds(&session).await;
    let mut rest = kinds.iter();
    for kind in ["created", "ready", "extended", "paused", "resumed", "terminated"] {
        assert!(rest.any(|each| each == kind), "{kind} is missing or out of order: {kinds:?}");
    }
    let all = session.events(0).await.unwrap();
    assert!(all.windows(2).all(|pair| pair[0].sequence < pair[1].sequence));
    assert!(all.iter().all(|event| event.at.is_some() && !event.summary.is_empty()));
    let later = session.events(all[1].sequence).await.unwrap();
    assert_eq!(later.len(), all.len() - 2);
}

async fn what_happens_is_told(world: &World) {
    let session = world.client.create(small().wait(Wait::No)).await.unwrap();
    let mut events = session.watch_events(0).await.unwrap();
    let mut seen = Vec::new();
    while let Some(event) = events.next().await.unwrap() {
        if event.kind == "ready" {
            session.close().await.unwrap();
        }
        seen.push(event.kind);
    }
    assert_eq!(
        (seen.first().map(String::as_str), seen.last().map(String::as_str)),
        (Some("created"), Some("terminated"))
    );
}

async fn a_session_is_explained(world: &World) {
    let session = world.client.create(small()).await.unwrap();
    let findings = session.explain().await.unwrap();
    assert_eq!(findings[0].code, "healthy", "{findings:?}");
    let killed = session.shell("kill -9 $$").output().await.unwrap();
    assert!(!killed.is_success());
    let findings = session.explain().await.unwrap();
    let finding = findings.iter().find(|each| each.code == "command_killed").unwrap();
    assert!(!finding.title.is_empty() && finding.at.is_some(), "{finding:?}");
    session.close().await.unwrap();
}

async fn commands_have_ids(world: &World) {
    let running = world.session.command(["sleep", "60"]).start().await.unwrap();
    let id = running.execution_id().unwrap().to_owned();
    running.kill().await;
    let output = running.wait().await.unwrap();
    assert_eq!(output.execution_id.as_deref(), Some(id.as_str()));
    let events = world.session.events(0).await.unwrap();
    let killed = events.iter().find(|event| event.execution_id.as_deref() == Some(id.as_str())).unwrap();
    assert_eq!(killed.kind, "command_killed");
}

/// A repository with one commit on `main`, one more on `topic`, and a pull request of that.
const ORIGIN: &str = "
export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
git init -q -b main source && cd source
echo one > file && git add file && git commit -q -m first
git checkout -q -b topic && echo two > file && git commit -q -a -m second
cd .. && git clone -q --bare source origin.git
git -C origin.git update-ref refs/pull/7/head topic
";

async fn git_works_in_the_sandbox(world: &World) {
    let session = world.client.create(small()).await.unwrap();
    say(&session, ORIGIN).await;
    let git = session.git();
    let options = CloneOptions::default().branch(Some("main".into())).directory(Some("clone".into())).depth(None);
    git.clone_repository("file:///home/tenki/origin.git", options).await.unwrap();
    assert_eq!(say(&session, "cat clone/file").await, "one");
    let options = FetchPrOptions::default().directory(Some("clone".into()));
    assert_eq!(git.fetch_pr(7, options).await.unwrap(), "pr-7");
    assert_eq!(say(&session, "cat clone/file; git -C clone branch --show-current").await, "two\npr-7");

    // The others work on a repository that is the home directory.
    say(&session, "mv clone/.git . && git checkout -q -f main").await;
    let log = git.log(LogOptions::default().max_count(Some(1))).await.unwrap();
    assert!(log.contains("first") && !log.contains("second"), "{log}");
    let diff = DiffOptions::default().base(Some("main".into())).head(Some("pr-7".into()));
    let diff = git.diff(diff).await.unwrap();
    assert!(diff.contains("-one") && diff.contains("+two"), "{diff}");
    git.checkout("own", true).await.unwrap();
    assert_eq!(say(&session, "git branch --show-current").await, "own");
    session.close().await.unwrap();
}

async fn failures_of_git_are_typed(world: &World) {
    let git = world.session.git();
    let missing = git.clone_repository("file:///home/tenki/nowhere.git", CloneOptions::default()).await.unwrap_err();
    match &missing {
        Error::GitFailed { exit_code: Some(128), stderr: Some(stderr), .. } => {
            assert!(stderr.contains("nowhere.git"), "{stderr}");
        }
        other => panic!("{other:?}"),
    }
    assert!(!missing.retryable(), "{missing:?}");
    let unfetched = git.fetch_pr(1, FetchPrOptions::default()).await.unwrap_err();
    assert!(matches!(unfetched, Error::GitFailed { exit_code: Some(_), .. }), "{unfetched:?}");
    let option = git.fetch_pr(1, FetchPrOptions::default().remote(Some("--upload-pack=x".into())));
    assert!(matches!(option.await, Err(Error::InvalidOptions(_))));
}
