//! What sysfs says about a PCI function, before DPDK is asked to open it.

use std::path::Path;

use super::PciAddress;
use crate::error::{Error, Result};

const DEVICES: &str = "/sys/bus/pci/devices";

/// Kernel drivers through which DPDK opens a device: those that hand it out whole, and those that share it.
const USABLE: &[&str] = &["vfio-pci", "igb_uio", "uio_pci_generic", "mlx4_core", "mlx5_core", "mana"];

/// [`Error::VfAbsent`] unless the function exists and is bound to a driver DPDK can use.
pub(super) fn require_usable(address: PciAddress) -> Result<()> {
    require_usable_in(Path::new(DEVICES), address)
}

fn require_usable_in(devices: &Path, address: PciAddress) -> Result<()> {
    let device = devices.join(address.to_string());
    if !device.exists() {
        return Err(Error::VfAbsent(format!(
            "no PCI device {address}; create the VF (sriov_numvfs) or correct the address"
        )));
    }
    let driver = std::fs::read_link(device.join("driver")).ok();
    let driver = driver.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy());
    match driver {
        Some(name) if USABLE.contains(&name.as_ref()) => Ok(()),
        Some(name) => Err(Error::VfAbsent(format!("PCI device {address} is bound to {name}; bind it to vfio-pci"))),
        None => Err(Error::VfAbsent(format!("PCI device {address} is bound to no driver; bind it to vfio-pci"))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_device_is_absent_until_it_is_bound_to_a_usable_driver() {
        let sysfs = tempfile::tempdir().unwrap();
        let address: PciAddress = "0000:05:08.1".parse().unwrap();
        let absent = |part: &str| match require_usable_in(sysfs.path(), address) {
            Err(Error::VfAbsent(text)) => assert!(text.contains(part), "{text}"),
            other => panic!("{other:?}"),
        };
        absent("no PCI device 0000:05:08.1");

        let device = sysfs.path().join("0000:05:08.1");
        std::fs::create_dir(&device).unwrap();
        absent("no driver");

        symlink("../../../bus/pci/drivers/igbvf", device.join("driver")).unwrap();
        absent("bound to igbvf");

        for driver in ["vfio-pci", "mlx5_core"] {
            std::fs::remove_file(device.join("driver")).unwrap();
            symlink(format!("../../../bus/pci/drivers/{driver}"), device.join("driver")).unwrap();
            require_usable_in(sysfs.path(), address).unwrap();
        }
    }
}
