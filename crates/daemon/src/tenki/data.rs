//! The data plane's rpcs about paths. Those that carry file contents are in `files.rs`.

use connectrpc::{ConnectError, RequestContext};
use nagaya_api::error::Error;
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::OpenSession;

use super::certificate;
use super::messages;
use super::service::TenkiService;
use crate::rpc::convert;
use crate::rpc::parse::{check_path, required};
use crate::rpc::service::held;

/// Sent by clients that only want to open the connection; such a call is not activity.
const PROBE_HEADER: &str = "x-tenki-dataplane-probe";

impl TenkiService {
    /// The sandbox that the call's certificate opens.
    pub(super) async fn open(&self, context: &RequestContext, session_id: &str) -> Result<OpenSession, Error> {
        let certificate = certificate::shown(context.headers())?;
        let id = convert::id(session_id, "session_id")?;
        if context.header(PROBE_HEADER).is_some() {
            self.engine.probe(certificate, id).await
        } else {
            self.engine.open(certificate, id).await
        }
    }

    pub(super) async fn stat(
        &self,
        context: &RequestContext,
        request: wire::SandboxSessionDataPlaneServiceStatRequest,
    ) -> Result<wire::SandboxSessionDataPlaneServiceStatResponse, ConnectError> {
        let request = required(request.request.into_option(), "request")?;
        check_path(&request.path)?;
        let open = self.open(context, &request.session_id).await?;
        let stat = open.guest.stat(&request.path).await.map_err(messages::guest_error)?;
        let response = match stat {
            None => wire::StatResponse::default(),
            Some(stat) => wire::StatResponse {
                exists: true,
                size: convert::saturating(stat.size),
                mode: stat.mode,
                modified_unix_ns: stat.modified_unix_ns,
                is_dir: stat.is_dir,
                is_symlink: stat.is_symlink,
                symlink_target: stat.symlink_target,
            },
        };
        Ok(wire::SandboxSessionDataPlaneServiceStatResponse { response: response.into() })
    }

    pub(super) async fn mkdir(
        &self,
        context: &RequestContext,
        request: wire::SandboxSessionDataPlaneServiceMkdirRequest,
    ) -> Result<wire::SandboxSessionDataPlaneServiceMkdirResponse, ConnectError> {
        let request = required(request.request.into_option(), "request")?;
        check_path(&request.path)?;
        let open = self.open(context, &request.session_id).await?;
        let mode = if request.mode == 0 { 0o755 } else { request.mode };
        let made = open.guest.make_directory(&request.path, mode, request.recursive).await;
        let response = wire::MkdirResponse { modified_unix_ns: made.map_err(messages::guest_error)? };
        Ok(wire::SandboxSessionDataPlaneServiceMkdirResponse { response: response.into() })
    }

    pub(super) async fn remove(
        &self,
        context: &RequestContext,
        request: wire::SandboxSessionDataPlaneServiceRemoveRequest,
    ) -> Result<wire::SandboxSessionDataPlaneServiceRemoveResponse, ConnectError> {
        let request = required(request.request.into_option(), "request")?;
        check_path(&request.path)?;
        let open = self.open(context, &request.session_id).await?;
        let removed = open.guest.remove(&request.path, request.recursive).await.map_err(messages::guest_error)?;
        let response = wire::RemoveResponse { removed: removed > 0, entries_removed: convert::saturating(removed) };
        Ok(wire::SandboxSessionDataPlaneServiceRemoveResponse { response: response.into() })
    }

    pub(super) async fn list(
        &self,
        context: &RequestContext,
        request: wire::SandboxSessionDataPlaneServiceListRequest,
    ) -> Result<wire::SandboxSessionDataPlaneServiceListResponse, ConnectError> {
        let request = required(request.request.into_option(), "request")?;
        check_path(&request.path)?;
        let open = self.open(context, &request.session_id).await?;
        let room = held(context)?;
        let entries = open.guest.list_directory(&request.path, request.include_hidden, &*room).await;
        let entry = |entry: nagaya_engine::ports::DirectoryEntry| wire::ListEntry {
            name: entry.name,
            is_dir: entry.is_dir,
            size: convert::saturating(entry.size),
            mode: entry.mode,
            modified_unix_ns: entry.modified_unix_ns,
        };
        let entries = entries.map_err(messages::guest_error)?.into_iter().map(entry).collect();
        let response = wire::ListResponse { entries };
        Ok(wire::SandboxSessionDataPlaneServiceListResponse { response: response.into() })
    }
}
