//! Ports of sandboxes, and the URLs under which they are reached.

use std::time::{Duration, SystemTime};

use nagaya_api::tenki::v1;
use nagaya_api::tenki::v1::get_preview_url_request::Lookup;
use serde::Serialize;

use crate::client::{PAGE_SIZE, all_pages};
use crate::settable::settable;
use crate::{Client, Error, Result, Session, wire};

settable! {
    /// How a port is exposed.
    #[derive(Debug, Clone, Default)]
    pub struct ExposeOptions {
        /// When it ends by itself, from now on; the server's choice by default.
        pub ttl: Option<Duration>,
        /// A name for a URL that outlives the session: 3 to 63 lower-case letters, digits and hyphens.
        pub slug: Option<String>,
    }
}

/// A port that is reached from outside.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ExposedPort {
    pub port: u16,
    /// Where a browser goes. Its form is the server's choice.
    pub preview_url: String,
    /// Present when the URL outlives the session.
    pub preview_url_id: Option<String>,
    pub slug: Option<String>,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub expires_at: Option<SystemTime>,
}

/// A URL that opens a private preview for whoever has it.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct OpenedPreview {
    pub port: u16,
    pub preview_url: String,
    pub viewer_token: String,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub expires_at: Option<SystemTime>,
}

settable! {
    /// What a new preview URL is.
    #[derive(Debug, Clone, Default)]
    pub struct CreatePreviewUrlOptions {
        /// 3 to 63 lower-case letters, digits and hyphens; unique on a server.
        pub slug: String,
        /// Where it leads from the beginning; both or neither.
        pub session_id: Option<String>,
        pub port: Option<u16>,
        /// The caller's own workspace when there is none.
        pub workspace_id: Option<String>,
    }
}

settable! {
    /// Which preview URLs [`Client::list_preview_urls`] tells of.
    #[derive(Debug, Clone, Default)]
    pub struct ListPreviewUrlsOptions {
        pub workspace_id: Option<String>,
        /// Only those that lead to this session.
        pub session_id: Option<String>,
    }
}

/// A named URL, and the port that it leads to.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct PreviewUrl {
    pub id: String,
    pub workspace_id: String,
    pub owner_id: String,
    pub slug: String,
    pub preview_url: String,
    /// `None` while it leads nowhere.
    pub session_id: Option<String>,
    pub port: Option<u16>,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub created_at: Option<SystemTime>,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub updated_at: Option<SystemTime>,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub last_accessed_at: Option<SystemTime>,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub expires_at: Option<SystemTime>,
}

impl Session {
    /// Makes a port reachable. Fails with [`RefusalKind::InboundDisabled`](crate::RefusalKind::InboundDisabled) and [`RefusalKind::PortLimitExceeded`](crate::RefusalKind::PortLimitExceeded).
    pub async fn expose_port(&self, port: u16, options: ExposeOptions) -> Result<ExposedPort> {
        let expires_at = options.ttl.and_then(|ttl| SystemTime::now().checked_add(ttl));
        let request = v1::ExposePortRequest {
            session_id: self.id().to_owned(),
            port: port.into(),
            expires_at: wire::timestamp(expires_at),
            slug: options.slug,
        };
        let answer = self.client().control().expose_port(request).await.map_err(Error::of_rpc)?;
        Ok(ExposedPort {
            port: wire::unsigned(answer.port),
            preview_url: answer.preview_url,
            preview_url_id: answer.preview_url_id,
            slug: answer.slug,
            expires_at: wire::time(answer.expires_at),
        })
    }

    /// Makes a port unreachable again.
    pub async fn unexpose_port(&self, port: u16) -> Result<()> {
        let request = v1::UnexposePortRequest { session_id: self.id().to_owned(), port: port.into() };
        self.client().control().unexpose_port(request).await.map_err(Error::of_rpc)?;
        Ok(())
    }

    pub async fn exposed_ports(&self) -> Result<Vec<ExposedPort>> {
        let request = v1::ListExposedPortsRequest { session_id: self.id().to_owned() };
        let answer = self.client().control().list_exposed_ports(request).await.map_err(Error::of_rpc)?;
        let ports = answer.ports.into_iter().map(|port| ExposedPort {
            port: wire::unsigned(port.port),
            preview_url: port.preview_url,
            preview_url_id: port.preview_url_id,
            slug: port.slug,
            expires_at: wire::time(port.expires_at),
        });
        Ok(ports.collect())
    }

    /// A private URL for a port, which [`Client::touch_preview`] keeps alive.
    pub async fn open_preview(&self, port: u16) -> Result<OpenedPreview> {
        let request =
            v1::OpenPreviewRequest { session_id: self.id().to_owned(), port: port.into(), ..Default::default() };
        let answer = self.client().control().open_preview(request).await.map_err(Error::of_rpc)?;
        Ok(OpenedPreview {
            port: wire::unsigned(answer.port),
            preview_url: answer.preview_url,
            viewer_token: answer.viewer_token,
            expires_at: wire::time(answer.expires_at),
        })
    }
}

impl Client {
    /// Keeps a private preview alive; answers the server's time of it.
    pub async fn touch_preview(&self, viewer_token: &str) -> Result<Option<SystemTime>> {
        let request = v1::TouchPreviewRequest { preview_token: viewer_token.to_owned() };
        Ok(wire::time(self.control().touch_preview(request).await.map_err(Error::of_rpc)?.last_accessed_at))
    }

    pub async fn create_preview_url(&self, options: CreatePreviewUrlOptions) -> Result<PreviewUrl> {
        let request = v1::CreatePreviewUrlRequest {
            slug: options.slug,
            session_id: options.session_id,
            port: options.port.map(Into::into),
            workspace_id: options.workspace_id,
            ..Default::default()
        };
        described(self.control().create_preview_url(request).await.map_err(Error::of_rpc)?.preview_url)
    }

    pub async fn get_preview_url(&self, id: &str) -> Result<PreviewUrl> {
        self.look_up_preview_url(Lookup::PreviewUrlId(id.to_owned())).await
    }

    pub async fn get_preview_url_by_slug(&self, slug: &str) -> Result<PreviewUrl> {
        self.look_up_preview_url(Lookup::Slug(slug.to_owned())).await
    }

    async fn look_up_preview_url(&self, lookup: Lookup) -> Result<PreviewUrl> {
        let request = v1::GetPreviewUrlRequest { lookup: Some(lookup) };
        described(self.control().get_preview_url(request).await.map_err(Error::of_rpc)?.preview_url)
    }

    pub async fn list_preview_urls(&self, options: ListPreviewUrlsOptions) -> Result<Vec<PreviewUrl>> {
        let urls = all_pages(|page_token| {
            let request = v1::ListPreviewUrlsRequest {
                workspace_id: options.workspace_id.clone(),
                session_id: options.session_id.clone(),
                page_size: PAGE_SIZE,
                page_token,
                ..Default::default()
            };
            async move {
                let answer = self.control().list_preview_urls(request).await.map_err(Error::of_rpc)?;
                Ok((answer.preview_urls, answer.next_page_token))
            }
        });
        Ok(urls.await?.into_iter().map(PreviewUrl::of_wire).collect())
    }

    /// Lets a preview URL lead to a port of a session.
    pub async fn bind_preview_url(&self, id: &str, session_id: &str, port: u16) -> Result<PreviewUrl> {
        let request = v1::BindPreviewUrlRequest {
            preview_url_id: id.to_owned(),
            session_id: session_id.to_owned(),
            port: port.into(),
            ..Default::default()
        };
        described(self.control().bind_preview_url(request).await.map_err(Error::of_rpc)?.preview_url)
    }

    /// Lets a preview URL lead nowhere.
    pub async fn unbind_preview_url(&self, id: &str) -> Result<PreviewUrl> {
        let request = v1::UnbindPreviewUrlRequest { preview_url_id: id.to_owned() };
        described(self.control().unbind_preview_url(request).await.map_err(Error::of_rpc)?.preview_url)
    }

    pub async fn delete_preview_url(&self, id: &str) -> Result<()> {
        let request = v1::DeletePreviewUrlRequest { preview_url_id: id.to_owned() };
        self.control().delete_preview_url(request).await.map_err(Error::of_rpc)?;
        Ok(())
    }
}

fn described(url: impl Into<Option<v1::PreviewUrl>>) -> Result<PreviewUrl> {
    url.into().map(PreviewUrl::of_wire).ok_or_else(|| Error::bad_answer("it names no preview URL"))
}

impl PreviewUrl {
    pub(crate) fn of_wire(url: v1::PreviewUrl) -> Self {
        Self {
            id: url.id,
            workspace_id: url.workspace_id,
            owner_id: url.owner_id,
            slug: url.slug,
            preview_url: url.preview_url,
            session_id: url.session_id.filter(|id| !id.is_empty()),
            port: url.port.map(wire::unsigned).filter(|port| *port != 0),
            created_at: wire::time(url.created_at),
            updated_at: wire::time(url.updated_at),
            last_accessed_at: wire::time(url.last_accessed_at),
            expires_at: wire::time(url.expires_at),
        }
    }
}
