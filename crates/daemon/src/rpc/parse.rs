//! What requests say, as values, or why they cannot be understood.

use buffa_types::google::protobuf::{Duration, Timestamp};
use nagaya_api::error::{Code, Error};
use nagaya_api::ids::WorkspaceId;
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::NewMount;
use nagaya_engine::model::{Egress, UnixMs};

use super::convert;

/// Longest path, as the kernel has it.
const PATH_BYTES_MAX: usize = 4096;

pub(crate) fn invalid(detail: &str) -> Error {
    Error::new(Code::InvalidArgument, detail)
}

pub(crate) fn page_size(asked: i32) -> Result<u32, Error> {
    u32::try_from(asked).map_err(|_| invalid("page_size must not be negative"))
}

/// The workspace that was named, under either of its two names.
pub(crate) fn workspace(workspace_id: Option<&str>, project_id: Option<&str>) -> Result<Option<WorkspaceId>, Error> {
    let workspace = convert::optional_id::<WorkspaceId>(workspace_id, "workspace_id")?;
    let project = convert::optional_id::<WorkspaceId>(project_id, "project_id")?;
    match (workspace, project) {
        (Some(workspace), Some(project)) if workspace != project => Err(Code::WorkspaceNotFound.into()),
        _ => Ok(workspace.or(project)),
    }
}

pub(crate) fn milliseconds(duration: Option<&Duration>, field: &str) -> Result<Option<u64>, Error> {
    duration.map(|duration| convert::milliseconds(duration, field)).transpose()
}

pub(crate) fn moment(at: Option<&Timestamp>) -> Result<Option<UnixMs>, Error> {
    at.map(|at| convert::unix_ms(at, "expires_at")).transpose()
}

/// A port that the wire has as signed, and wider than ports are.
pub(crate) fn port(number: i32) -> Result<u16, Error> {
    let port = u16::try_from(number).ok().filter(|port| *port != 0);
    port.ok_or_else(|| invalid("port must be 1 to 65535"))
}

/// A place for a volume, as a request names it.
pub(crate) fn mount(mount: wire::VolumeMount) -> Result<NewMount, Error> {
    Ok(NewMount {
        volume_id: convert::id(&mount.volume_id, "volume_id")?,
        path: mount.mount_path,
        readonly: mount.readonly,
    })
}

pub(crate) fn egress(policy: wire::SessionEgressPolicy) -> Egress {
    Egress { allow_domains: policy.allow_domains, allow_cidrs: policy.allow_cidrs }
}

/// A message that the contract requires inside another.
pub(crate) fn required<T>(message: Option<T>, field: &str) -> Result<T, Error> {
    message.ok_or_else(|| Error::new(Code::InvalidArgument, format!("{field} is required")))
}

pub(crate) fn check_path(path: &str) -> Result<(), Error> {
    let problem = match path {
        "" => "path is empty",
        path if path.len() > PATH_BYTES_MAX => "path is longer than 4096 bytes",
        path if path.contains('\0') => "path holds a NUL byte",
        _ => return Ok(()),
    };
    Err(Error::new(Code::InvalidPath, problem))
}
