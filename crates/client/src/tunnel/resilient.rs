//! A tunnel that comes back when it was lost.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::{oneshot, watch};

use super::{Tunnel, TunnelEnd, TunnelEndReason, TunnelOptions};
use crate::data_plane::jittered;
use crate::pipe::AbortOnDrop;
use crate::settable::settable;
use crate::{Error, RefusalKind, Result, Session};

settable! {
    /// Pauses before a lost tunnel is opened again: each is twice the one before.
    #[derive(Debug, Clone, Copy)]
    pub struct Backoff {
        pub initial: Duration,
        pub max: Duration,
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self { initial: Duration::from_millis(250), max: Duration::from_secs(10) }
    }
}

impl Backoff {
    /// The pause after this many attempts in a row, without jitter.
    fn pause(&self, attempts: u32) -> Duration {
        self.initial.saturating_mul(1 << attempts.saturating_sub(1).min(20)).min(self.max)
    }
}

/// What a resilient tunnel is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
#[non_exhaustive]
pub enum TunnelState {
    /// Connections reach the target. The port may be another one than before.
    Open {
        sandbox_port: u16,
        sandbox_address: String,
    },
    /// It was lost and is opened again after a pause.
    Waiting {
        attempt: u32,
        lost: TunnelEnd,
    },
    Connecting {
        attempt: u32,
    },
    /// It does not come back.
    Ended(TunnelEnd),
}

/// A tunnel that is opened again when it is lost, until it is dropped or cannot be opened for a lasting reason.
pub struct ResilientTunnel {
    states: watch::Receiver<TunnelState>,
    close: Option<oneshot::Sender<()>>,
    _task: AbortOnDrop<()>,
}

impl fmt::Debug for ResilientTunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResilientTunnel").field("state", &*self.states.borrow()).finish_non_exhaustive()
    }
}

impl Session {
    /// As [`Session::tunnel`], for a tunnel that outlives lost connections and restarts of the server.
    /// Fails when it cannot be opened the first time.
    pub async fn resilient_tunnel(
        &self,
        target: &str,
        options: TunnelOptions,
        backoff: Backoff,
    ) -> Result<ResilientTunnel> {
        let tunnel = self.tunnel(target, options.clone()).await?;
        let (state, states) = watch::channel(open(&tunnel));
        let (close, closed) = oneshot::channel();
        let keeper = Keeper { session: self.clone(), target: target.to_owned(), options, backoff, state, closed };
        let task = AbortOnDrop(tokio::spawn(keeper.keep(tunnel)));
        Ok(ResilientTunnel { states, close: Some(close), _task: task })
    }
}

impl ResilientTunnel {
    pub fn state(&self) -> TunnelState {
        self.states.borrow().clone()
    }

    /// All further states. One that is replaced before it is looked at is not seen.
    pub fn states(&self) -> watch::Receiver<TunnelState> {
        self.states.clone()
    }

    /// Ends the tunnel and every connection through it.
    pub async fn close(mut self) {
        drop(self.close.take());
        let _ = self.states.wait_for(|state| matches!(state, TunnelState::Ended(_))).await;
    }
}

fn open(tunnel: &Tunnel) -> TunnelState {
    TunnelState::Open { sandbox_port: tunnel.sandbox_port(), sandbox_address: tunnel.sandbox_address().to_owned() }
}

struct Keeper {
    session: Session,
    target: String,
    options: TunnelOptions,
    backoff: Backoff,
    state: watch::Sender<TunnelState>,
    closed: oneshot::Receiver<()>,
}

impl Keeper {
    async fn keep(mut self, mut tunnel: Tunnel) {
        loop {
            let lost = tokio::select! {
                _ = &mut self.closed => {
                    tunnel.close().await;
                    return self.end(TunnelEnd { reason: TunnelEndReason::Closed, detail: String::new() });
                }
                lost = tunnel.ended() => lost,
            };
            drop(tunnel);
            tunnel = match self.reopen(lost).await {
                Ok(tunnel) => tunnel,
                Err(end) => return self.end(end),
            };
            self.state.send_replace(open(&tunnel));
        }
    }

    /// Opens the tunnel again, however often that has to be tried.
    async fn reopen(&mut self, mut lost: TunnelEnd) -> Result<Tunnel, TunnelEnd> {
        let mut attempt = 0;
        loop {
            if !comes_back(lost.reason) {
                return Err(lost);
            }
            // A server that goes on purpose may have a successor already.
            let at_once = lost.reason == TunnelEndReason::EngineDraining && attempt == 0;
            attempt += 1;
            let pause = if at_once { Duration::ZERO } else { jittered(self.backoff.pause(attempt)) };
            self.state.send_replace(TunnelState::Waiting { attempt, lost });
            let trying = async {
                tokio::time::sleep(pause).await;
                self.state.send_replace(TunnelState::Connecting { attempt });
                self.session.tunnel(&self.target, self.options.clone()).await
            };
            let opened = tokio::select! {
                _ = &mut self.closed => {
                    return Err(TunnelEnd { reason: TunnelEndReason::Closed, detail: String::new() });
                }
                opened = trying => opened,
            };
            match opened {
                Ok(tunnel) => return Ok(tunnel),
                Err(error) => lost = end_of(error),
            }
        }
    }

    fn end(&self, end: TunnelEnd) {
        self.state.send_replace(TunnelState::Ended(end));
    }
}

fn comes_back(reason: TunnelEndReason) -> bool {
    use TunnelEndReason::*;
    match reason {
        TransportError | EngineTerminated | EngineDraining | Timeout => true,
        Closed | HostError => false,
    }
}

/// What a failed attempt means for the tunnel.
fn end_of(error: Error) -> TunnelEnd {
    let reason = match &error {
        Error::TunnelEnded(end) => return end.clone(),
        Error::Unreachable { .. }
        | Error::StreamClosed(_)
        | Error::Refused { kind: RefusalKind::DataPlaneNotReady, .. }
        | Error::PrimitiveTimeout(_)
        | Error::Refused { kind: RefusalKind::DeadlineExceeded | RefusalKind::InvalidState, .. } => {
            TunnelEndReason::TransportError
        }
        error if error.retryable() => TunnelEndReason::TransportError,
        _ => TunnelEndReason::HostError,
    };
    TunnelEnd { reason, detail: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_their_maximum() {
        let backoff = Backoff::default();
        let milliseconds: Vec<_> = (1..=8).map(|attempts| backoff.pause(attempts).as_millis()).collect();
        assert_eq!(milliseconds, [250, 500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000]);
        assert_eq!(backoff.pause(u32::MAX), backoff.max);
        for _ in 0..100 {
            let pause = jittered(Duration::from_secs(4));
            assert!((3.0..=5.0).contains(&pause.as_secs_f64()), "{pause:?}");
        }
    }

    #[test]
    fn some_ends_are_for_good() {
        assert!(comes_back(TunnelEndReason::EngineTerminated));
        assert!(!comes_back(TunnelEndReason::HostError));
        assert!(!comes_back(TunnelEndReason::Closed));
        let gone = end_of(Error::InvalidOptions("x".into()));
        assert_eq!(gone.reason, TunnelEndReason::HostError);
        let unreachable = end_of(Error::Unreachable { message: "x".into(), unsent: true });
        assert_eq!(unreachable.reason, TunnelEndReason::TransportError);
    }
}
