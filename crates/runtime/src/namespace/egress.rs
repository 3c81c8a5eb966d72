//! EgressPolicy of sandboxes, as sessions name them.

use nagaya_api::ids::SessionId;
use nagaya_engine::model::{Connection, Egress};
use nagaya_engine::ports::DriverError;

use super::record::Record;
use super::{Inner, capacity, failed};

impl Inner {
    /// Changes where a running or frozen sandbox may go. The record comes first: a later server sets what it says.
    pub(super) fn set_egress(&self, id: SessionId, egress: Option<Egress>) -> Result<(), DriverError> {
        let (record, slot) = self.recorded(id)?;
        if record.egress != egress {
            let changed = Record { egress: egress.clone(), ..record };
            let written = changed.write_synced(&self.directory(id));
            written.map_err(|error| capacity::refusal("write the sandbox's record", &error))?;
        }
        // A sandbox without a link has no destinations, which is as narrow as can be.
        let Some(network) = &self.factory.network else { return Ok(()) };
        network.change(slot, egress.as_ref()).map_err(|error| failed("set the sandbox's destinations", &error))
    }

    pub(super) fn connections(&self, id: SessionId) -> Result<Vec<Connection>, DriverError> {
        let (_, slot) = self.recorded(id)?;
        let Some(network) = &self.factory.network else { return Ok(Vec::new()) };
        network.connections(slot).map_err(|error| failed("look at the sandbox's connections", &error))
    }

    fn recorded(&self, id: SessionId) -> Result<(Record, u32), DriverError> {
        let record = Record::read(&self.directory(id)).ok_or(DriverError::Gone)?;
        let slot = record.slot.ok_or(DriverError::Gone)?;
        Ok((record, slot))
    }
}
