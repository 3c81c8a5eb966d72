//! Preview URLs: named ones, which outlive sessions, and private ones, which open for holders of a token.

use connectrpc::RequestContext;
use nagaya_api::error::Error;
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::get_preview_url_request::Lookup;
use nagaya_engine::model::{Binding, PreviewKind};
use nagaya_engine::{ListPreviews, NewPreview, PreviewUrl};
use nagaya_gateway::preview::VIEWER_TOKEN_PARAMETER;

use super::ranges;
use super::service::TenkiService;
use crate::rpc::convert;
use crate::rpc::parse::{invalid, moment, port, workspace};
use crate::rpc::service::caller;

impl TenkiService {
    pub(super) async fn create_preview_url(
        &self,
        context: &RequestContext,
        request: wire::CreatePreviewUrlRequest,
    ) -> Result<wire::CreatePreviewUrlResponse, Error> {
        let caller = &caller(context)?;
        let binding = match (request.session_id, request.port.filter(|port| *port != 0)) {
            (None, None) => None,
            (Some(session_id), Some(number)) => Some(binding(&session_id, number)?),
            _ => return Err(invalid("session_id and port must be given together, or neither of them")),
        };
        let new = NewPreview {
            slug: ranges::slug(request.slug)?,
            binding,
            expires_at: moment(request.expires_at.as_option())?,
            workspace_id: workspace(request.workspace_id.as_deref(), convert::or_none(&request.project_id))?,
        };
        let found = self.engine.create_preview(caller, new).await?;
        Ok(wire::CreatePreviewUrlResponse { preview_url: preview_url(found).into() })
    }

    pub(super) async fn get_preview_url(
        &self,
        context: &RequestContext,
        request: wire::GetPreviewUrlRequest,
    ) -> Result<wire::GetPreviewUrlResponse, Error> {
        let caller = &caller(context)?;
        let found = match request.lookup {
            Some(Lookup::PreviewUrlId(id)) => self.engine.preview(caller, convert::id(&id, "preview_url_id")?).await?,
            Some(Lookup::Slug(slug)) => self.engine.preview_by_slug(caller, &slug).await?,
            None => return Err(invalid("preview_url_id or slug must be given")),
        };
        Ok(wire::GetPreviewUrlResponse { preview_url: preview_url(found).into() })
    }

    pub(super) async fn list_preview_urls(
        &self,
        context: &RequestContext,
        request: wire::ListPreviewUrlsRequest,
    ) -> Result<wire::ListPreviewUrlsResponse, Error> {
        let caller = &caller(context)?;
        let list = ListPreviews {
            workspace_id: workspace(request.workspace_id.as_deref(), convert::or_none(&request.project_id))?,
            session_id: convert::optional_id(request.session_id.as_deref(), "session_id")?,
            page_size: ranges::page_size(request.page_size)?,
            page_token: request.page_token,
        };
        let (previews, next_page_token) = self.engine.list_previews(caller, list).await?;
        let preview_urls = previews.into_iter().map(preview_url).collect();
        Ok(wire::ListPreviewUrlsResponse { preview_urls, next_page_token })
    }

    pub(super) async fn bind_preview_url(
        &self,
        context: &RequestContext,
        request: wire::BindPreviewUrlRequest,
    ) -> Result<wire::BindPreviewUrlResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.preview_url_id, "preview_url_id")?;
        let binding = binding(&request.session_id, request.port)?;
        let found = self.engine.bind_preview(caller, id, binding, moment(request.expires_at.as_option())?).await?;
        Ok(wire::BindPreviewUrlResponse { preview_url: preview_url(found).into() })
    }

    pub(super) async fn unbind_preview_url(
        &self,
        context: &RequestContext,
        request: wire::UnbindPreviewUrlRequest,
    ) -> Result<wire::UnbindPreviewUrlResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.preview_url_id, "preview_url_id")?;
        let found = self.engine.unbind_preview(caller, id).await?;
        Ok(wire::UnbindPreviewUrlResponse { preview_url: preview_url(found).into() })
    }

    pub(super) async fn delete_preview_url(
        &self,
        context: &RequestContext,
        request: wire::DeletePreviewUrlRequest,
    ) -> Result<wire::DeletePreviewUrlResponse, Error> {
        let caller = &caller(context)?;
        self.engine.delete_preview(caller, convert::id(&request.preview_url_id, "preview_url_id")?).await?;
        Ok(wire::DeletePreviewUrlResponse::default())
    }

    pub(super) async fn open_preview(
        &self,
        context: &RequestContext,
        request: wire::OpenPreviewRequest,
    ) -> Result<wire::OpenPreviewResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let (port, expires_at) = (port(request.port)?, moment(request.expires_at.as_option())?);
        let opened = self.engine.open_preview(caller, id, port, expires_at).await?;
        Ok(wire::OpenPreviewResponse {
            port: request.port,
            // The gateway looks for the token there, and puts a cookie in its place.
            preview_url: format!("{}/?{VIEWER_TOKEN_PARAMETER}={}", opened.url, opened.viewer_token),
            expires_at: convert::timestamp(opened.expires_at).into(),
            viewer_token: opened.viewer_token,
        })
    }

    pub(super) async fn touch_preview(
        &self,
        context: &RequestContext,
        request: wire::TouchPreviewRequest,
    ) -> Result<wire::TouchPreviewResponse, Error> {
        let caller = &caller(context)?;
        let at = self.engine.touch_preview(caller, token(&request.preview_token)?).await?;
        Ok(wire::TouchPreviewResponse { last_accessed_at: convert::timestamp(at).into() })
    }

    pub(super) async fn resolve_preview_token(
        &self,
        context: &RequestContext,
        request: wire::ResolvePreviewTokenRequest,
    ) -> Result<wire::ResolvePreviewTokenResponse, Error> {
        let caller = &caller(context)?;
        let target = self.engine.resolve_preview_token(caller, token(&request.token)?).await?;
        let binding = target.preview.binding;
        Ok(wire::ResolvePreviewTokenResponse {
            session_id: binding.map(|binding| binding.session_id.to_string()).unwrap_or_default(),
            // There is one host, and it has no id.
            host_id: String::new(),
            port: binding.map(|binding| binding.port.into()).unwrap_or_default(),
            mode: if target.preview.kind == PreviewKind::Private { "private" } else { "public" }.to_owned(),
            expires_at: target.preview.expires_at.map(convert::timestamp).into(),
            is_offline: target.is_offline,
        })
    }
}

fn binding(session_id: &str, number: i32) -> Result<Binding, Error> {
    Ok(Binding { session_id: convert::id(session_id, "session_id")?, port: port(number)? })
}

fn token(token: &str) -> Result<&str, Error> {
    if token.is_empty() { Err(invalid("the token must not be empty")) } else { Ok(token) }
}

fn preview_url(found: PreviewUrl) -> wire::PreviewUrl {
    let PreviewUrl { preview, url } = found;
    let workspace_id = preview.workspace_id.to_string();
    wire::PreviewUrl {
        id: preview.id.to_string(),
        project_id: workspace_id.clone(),
        workspace_id,
        owner_id: preview.owner_id.to_string(),
        slug: preview.label.clone(),
        token: preview.label,
        preview_url: url,
        session_id: preview.binding.map(|binding| binding.session_id.to_string()),
        port: preview.binding.map(|binding| binding.port.into()),
        created_at: convert::timestamp(preview.created_at).into(),
        updated_at: convert::timestamp(preview.updated_at).into(),
        last_accessed_at: preview.last_accessed_at.map(convert::timestamp).into(),
        expires_at: preview.expires_at.map(convert::timestamp).into(),
    }
}
