//! The data plane's unary rpcs: files as wholes, and directories.

use bytes::{Bytes, BytesMut};
use connectrpc::{ConnectError, RequestContext};
use nagaya_api::error::{Code, Error};
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::OpenSession;
use nagaya_engine::ports::{FileReader, WriteOptions};

use super::{Tenki, auth, convert, files};

/// Sent by clients that only want to open the connection; such a call is not activity.
const PROBE_HEADER: &str = "x-tenki-dataplane-probe";

/// Longest path, as the kernel has it.
const PATH_BYTES_MAX: usize = 4096;

impl Tenki {
    /// The sandbox that the call's certificate opens.
    pub(super) async fn open(&self, context: &RequestContext, session_id: &str) -> Result<OpenSession, Error> {
        let certificate = auth::certificate(context.headers())?;
        let id = convert::id(session_id, "session_id")?;
        if context.header(PROBE_HEADER).is_some() {
            self.engine.probe(certificate, id).await
        } else {
            self.engine.open(certificate, id).await
        }
    }

    pub(super) async fn read_file(
        &self,
        context: &RequestContext,
        request: Option<wire::ReadFileRequest>,
    ) -> Result<wire::ReadFileResponse, ConnectError> {
        let request = required(request, "request")?;
        check_path(&request.path)?;
        let open = self.open(context, &request.session_id).await?;
        let reader = open.guest.read_file(&request.path, 0, 0, 0).await.map_err(convert::guest_error)?;
        let content = self.read_whole(reader).await?;
        Ok(wire::ReadFileResponse { path: request.path, content, ..Default::default() })
    }

    /// The size is checked again while reading: generated files say 0, and others may grow.
    async fn read_whole(&self, mut reader: FileReader) -> Result<Bytes, ConnectError> {
        let bytes_max = self.message_bytes_max;
        let too_large = || {
            let detail = format!("the file is larger than message_bytes_max, {bytes_max} bytes; read it with ReadFileStream");
            Error::new(Code::MessageTooLarge, detail)
        };
        let announced = usize::try_from(reader.total_size).unwrap_or(usize::MAX);
        if announced > bytes_max {
            return Err(too_large().into());
        }
        let Some(first) = reader.chunks.recv().await.transpose().map_err(convert::guest_error)? else {
            return Ok(Bytes::new());
        };
        let Some(mut next) = reader.chunks.recv().await.transpose().map_err(convert::guest_error)? else {
            return if first.len() > bytes_max { Err(too_large().into()) } else { Ok(first) };
        };
        let mut content = BytesMut::with_capacity(announced.max(first.len() + next.len()));
        content.extend_from_slice(&first);
        loop {
            if content.len() + next.len() > bytes_max {
                return Err(too_large().into());
            }
            content.extend_from_slice(&next);
            match reader.chunks.recv().await.transpose().map_err(convert::guest_error)? {
                Some(chunk) => next = chunk,
                None => return Ok(content.freeze()),
            }
        }
    }

    pub(super) async fn write_file(
        &self,
        context: &RequestContext,
        request: Option<wire::WriteFileRequest>,
    ) -> Result<wire::WriteFileResponse, ConnectError> {
        let request = required(request, "request")?;
        check_path(&request.path)?;
        let open = self.open(context, &request.session_id).await?;
        let options = WriteOptions { mode: 0, truncate: true, sync: false };
        let writer = open.guest.write_file(&request.path, options).await.map_err(convert::guest_error)?;
        // A failed send means that writing failed; `finish` tells why.
        let _ = files::send(&writer.chunks, request.content).await;
        let written = writer.finish().await.map_err(convert::guest_error)?;
        Ok(wire::WriteFileResponse { path: request.path, size_bytes: files::size(written), ..Default::default() })
    }

    pub(super) async fn stat(
        &self,
        context: &RequestContext,
        request: Option<wire::StatRequest>,
    ) -> Result<wire::StatResponse, ConnectError> {
        let request = required(request, "request")?;
        check_path(&request.path)?;
        let open = self.open(context, &request.session_id).await?;
        let stat = open.guest.stat(&request.path).await.map_err(convert::guest_error)?;
        Ok(match stat {
            None => wire::StatResponse::default(),
            Some(stat) => wire::StatResponse {
                exists: true,
                size: files::size(stat.size),
                mode: stat.mode,
                modified_unix_ns: stat.modified_unix_ns,
                is_dir: stat.is_dir,
                is_symlink: stat.is_symlink,
                symlink_target: stat.symlink_target,
                ..Default::default()
            },
        })
    }

    pub(super) async fn mkdir(
        &self,
        context: &RequestContext,
        request: Option<wire::MkdirRequest>,
    ) -> Result<wire::MkdirResponse, ConnectError> {
        let request = required(request, "request")?;
        check_path(&request.path)?;
        let open = self.open(context, &request.session_id).await?;
        let mode = if request.mode == 0 { 0o755 } else { request.mode };
        let made = open.guest.make_directory(&request.path, mode, request.recursive).await;
        Ok(wire::MkdirResponse { modified_unix_ns: made.map_err(convert::guest_error)?, ..Default::default() })
    }

    pub(super) async fn remove(
        &self,
        context: &RequestContext,
        request: Option<wire::RemoveRequest>,
    ) -> Result<wire::RemoveResponse, ConnectError> {
        let request = required(request, "request")?;
        check_path(&request.path)?;
        let open = self.open(context, &request.session_id).await?;
        let removed = open.guest.remove(&request.path, request.recursive).await.map_err(convert::guest_error)?;
        Ok(wire::RemoveResponse { removed: removed > 0, entries_removed: files::size(removed), ..Default::default() })
    }

    pub(super) async fn list_directory(
        &self,
        context: &RequestContext,
        request: Option<wire::ListRequest>,
    ) -> Result<wire::ListResponse, ConnectError> {
        let request = required(request, "request")?;
        check_path(&request.path)?;
        let open = self.open(context, &request.session_id).await?;
        let entries = open.guest.list_directory(&request.path, request.include_hidden).await;
        let entry = |entry: nagaya_engine::ports::DirectoryEntry| wire::ListEntry {
            name: entry.name,
            is_dir: entry.is_dir,
            size: files::size(entry.size),
            mode: entry.mode,
            modified_unix_ns: entry.modified_unix_ns,
            ..Default::default()
        };
        let entries = entries.map_err(convert::guest_error)?.into_iter().map(entry).collect();
        Ok(wire::ListResponse { entries, ..Default::default() })
    }
}

/// A message that the contract requires inside another.
pub(super) fn required<T>(message: Option<T>, field: &str) -> Result<T, Error> {
    message.ok_or_else(|| Error::new(Code::InvalidArgument, format!("{field} is required")))
}

pub(super) fn check_path(path: &str) -> Result<(), Error> {
    let problem = match path {
        "" => "path is empty",
        path if path.len() > PATH_BYTES_MAX => "path is longer than 4096 bytes",
        path if path.contains('\0') => "path holds a NUL byte",
        _ => return Ok(()),
    };
    Err(Error::new(Code::InvalidPath, problem))
}
