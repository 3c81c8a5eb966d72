//! Placeholder while the real link is written.
pub struct Link;
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct LinkError;
#[async_trait::async_trait]
impl nagaya_engine::ports::Guest for Link {
    async fn run(&self, _: nagaya_engine::ports::Command) -> Result<nagaya_engine::ports::Process, nagaya_engine::ports::GuestError> { todo!() }
    async fn run_detached(&self, _: nagaya_api::ids::ExecutionId, _: nagaya_engine::ports::Command) -> Result<u32, nagaya_engine::ports::GuestError> { todo!() }
    async fn follow(&self, _: nagaya_api::ids::ExecutionId) -> Result<tokio::sync::mpsc::Receiver<nagaya_engine::ports::ProcessEvent>, nagaya_engine::ports::GuestError> { todo!() }
    async fn forget(&self, _: nagaya_api::ids::ExecutionId) -> Result<(), nagaya_engine::ports::GuestError> { todo!() }
    async fn read_file(&self, _: &str, _: u64, _: u64, _: u32) -> Result<nagaya_engine::ports::FileReader, nagaya_engine::ports::GuestError> { todo!() }
    async fn write_file(&self, _: &str, _: nagaya_engine::ports::WriteOptions) -> Result<nagaya_engine::ports::FileWriter, nagaya_engine::ports::GuestError> { todo!() }
    async fn stat(&self, _: &str) -> Result<Option<nagaya_engine::ports::FileStat>, nagaya_engine::ports::GuestError> { todo!() }
    async fn make_directory(&self, _: &str, _: u32, _: bool) -> Result<i64, nagaya_engine::ports::GuestError> { todo!() }
    async fn remove(&self, _: &str, _: bool) -> Result<u64, nagaya_engine::ports::GuestError> { todo!() }
    async fn list_directory(&self, _: &str, _: bool) -> Result<Vec<nagaya_engine::ports::DirectoryEntry>, nagaya_engine::ports::GuestError> { todo!() }
}
impl Link {
    pub async fn connect(_: &std::path::Path) -> Result<std::sync::Arc<Link>, LinkError> { Err(LinkError) }
    pub fn count_out_of_memory_kills(&self, _: impl Fn() -> u64 + Send + Sync + 'static) {}
}
