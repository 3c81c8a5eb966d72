//! Ports of sandboxes that are exposed to the outside.

use connectrpc::RequestContext;
use nagaya_api::error::Error;
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::{NewExposure, PreviewUrl};

use super::messages::slug;
use super::ranges;
use super::service::TenkiService;
use crate::rpc::convert;
use crate::rpc::parse::{moment, port};
use crate::rpc::service::caller;

impl TenkiService {
    pub(super) async fn expose_port(
        &self,
        context: &RequestContext,
        request: wire::ExposePortRequest,
    ) -> Result<wire::ExposePortResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let new = NewExposure {
            port: port(request.port)?,
            expires_at: moment(request.expires_at.as_option())?,
            // JSON clients send an empty one for none.
            slug: request.slug.filter(|slug| !slug.is_empty()).map(ranges::slug).transpose()?,
        };
        let exposed = exposure(self.engine.expose_port(caller, id, new).await?);
        Ok(wire::ExposePortResponse {
            // An address of the days before previews; nothing can be reached there.
            host_address: String::new(),
            port: exposed.port,
            preview_url: exposed.preview_url,
            expires_at: exposed.expires_at,
            preview_url_id: exposed.preview_url_id,
            slug: exposed.slug,
        })
    }

    pub(super) async fn unexpose_port(
        &self,
        context: &RequestContext,
        request: wire::UnexposePortRequest,
    ) -> Result<wire::UnexposePortResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        self.engine.unexpose_port(caller, id, port(request.port)?).await?;
        Ok(wire::UnexposePortResponse::default())
    }

    pub(super) async fn list_exposed_ports(
        &self,
        context: &RequestContext,
        request: wire::ListExposedPortsRequest,
    ) -> Result<wire::ListExposedPortsResponse, Error> {
        let caller = &caller(context)?;
        let exposed = self.engine.exposed_ports(caller, convert::id(&request.session_id, "session_id")?).await?;
        Ok(wire::ListExposedPortsResponse { ports: exposed.into_iter().map(exposure).collect() })
    }
}

fn exposure(exposed: PreviewUrl) -> wire::PortExposure {
    let PreviewUrl { preview, url } = exposed;
    let slug = slug(&preview);
    wire::PortExposure {
        port: preview.binding.map(|binding| binding.port.into()).unwrap_or_default(),
        preview_url: url,
        expires_at: preview.expires_at.map(convert::timestamp).into(),
        // Only what has a name is a resource of its own.
        preview_url_id: slug.is_some().then(|| preview.id.to_string()),
        slug,
    }
}
