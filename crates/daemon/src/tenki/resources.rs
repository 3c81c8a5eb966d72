//! What the contract lets sandboxes have, and gives those of which nobody says anything.

use nagaya_api::error::{Code, Error};
use nagaya_api::tenki::limits;
use nagaya_engine::model::Resources;

/// What the contract gives sandboxes of which nobody says anything.
pub(super) const DEFAULT_RESOURCES: Resources =
    Resources::of(limits::DEFAULT_CPU_CORES, limits::DEFAULT_MEMORY_MB, limits::DEFAULT_DISK_GB);

fn within(number: i32, range: std::ops::RangeInclusive<u32>, refusal: &str) -> Result<u32, Error> {
    let number = u32::try_from(number).ok().filter(|number| range.contains(number));
    number.ok_or_else(|| Error::new(Code::InvalidResources, refusal))
}

/// Thousandths of a processor.
pub(super) fn cpu_cores(cores: i32) -> Result<u32, Error> {
    Ok(within(cores, limits::CPU_CORES, "cpu_cores must be 1 to 16")? * 1_000)
}

/// Bytes.
pub(super) fn memory_mb(megabytes: i32) -> Result<u64, Error> {
    let refusal = "memory_mb must be an even number from 128 to 65536";
    match within(megabytes, limits::MEMORY_MB, refusal)? {
        odd if odd % 2 == 1 => Err(Error::new(Code::InvalidResources, refusal)),
        megabytes => Ok(u64::from(megabytes) << 20),
    }
}

/// Bytes.
pub(super) fn disk_size_gb(gigabytes: i32) -> Result<u64, Error> {
    Ok(u64::from(within(gigabytes, limits::DISK_GB, "disk_gb must be 5 to 100")?) << 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_outside_the_contract_are_refused() {
        assert_eq!(DEFAULT_RESOURCES, Resources::of(2, 4_096, 5));
        assert_eq!((cpu_cores(1), cpu_cores(16)), (Ok(1_000), Ok(16_000)));
        assert_eq!((memory_mb(128), memory_mb(65_536)), (Ok(128 << 20), Ok(64 << 30)));
        assert_eq!((disk_size_gb(5), disk_size_gb(100)), (Ok(5 << 30), Ok(100 << 30)));
        let refused = |error: Error| assert_eq!(error.code, Code::InvalidResources);
        [-1, 0, 17].into_iter().for_each(|cores| refused(cpu_cores(cores).unwrap_err()));
        [-2, 127, 129, 65_537, 65_538].into_iter().for_each(|megabytes| refused(memory_mb(megabytes).unwrap_err()));
        [-5, 4, 101].into_iter().for_each(|gigabytes| refused(disk_size_gb(gigabytes).unwrap_err()));
    }
}
