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

/// The IOMMU group that a function is in alone, with a real IOMMU, and bound to vfio-pci. Else why not.
pub(super) fn own_group(address: PciAddress) -> Result<i32, String> {
    own_group_in(Path::new(DEVICES), address)
}

/// [`Error::VfAbsent`] if somebody else has the function's IOMMU group: VFIO gives it to one process at a time.
pub(super) fn require_free(address: PciAddress, group: i32) -> Result<()> {
    let path = format!("/dev/vfio/{group}");
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(&path);
    require_opened(address, &path, opened)
}

fn require_opened(address: PciAddress, path: &str, opened: std::io::Result<std::fs::File>) -> Result<()> {
    match opened {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(Error::VfAbsent(format!(
            "another process has {path}, the IOMMU group of {address}; end it (fuser -v {path} says which)"
        ))),
        // For DPDK to find, or not.
        _ => Ok(()),
    }
}

fn own_group_in(devices: &Path, address: PciAddress) -> Result<i32, String> {
    let device = devices.join(address.to_string());
    let name_of = |link: &str| {
        let target = std::fs::read_link(device.join(link)).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    };
    match name_of("driver").as_deref() {
        Some("vfio-pci") => {}
        other => return Err(format!("it is bound to {}, not to vfio-pci", other.unwrap_or("no driver"))),
    }
    let group = device.join("iommu_group");
    let Some(number) = name_of("iommu_group").and_then(|name| name.parse().ok()) else {
        return Err("it is in no IOMMU group".into());
    };
    if std::fs::read_to_string(group.join("name")).is_ok_and(|name| name.trim() == "vfio-noiommu") {
        return Err("there is no IOMMU (VFIO's noiommu mode)".into());
    }
    match std::fs::read_dir(group.join("devices")).map(Iterator::count) {
        Ok(1) => Ok(number),
        Ok(_) => Err(format!("it shares IOMMU group {number} with other functions")),
        Err(error) => Err(format!("the functions of IOMMU group {number} cannot be listed: {error}")),
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

    #[test]
    fn a_group_that_another_process_has_is_told_with_who_to_look_for() {
        let address: PciAddress = "0000:05:08.1".parse().unwrap();
        let opened = |errno| require_opened(address, "/dev/vfio/42", Err(std::io::Error::from_raw_os_error(errno)));
        match opened(libc::EBUSY) {
            Err(Error::VfAbsent(text)) => assert!(text.contains("fuser -v /dev/vfio/42"), "{text}"),
            other => panic!("{other:?}"),
        }
        opened(libc::ENOENT).unwrap();
    }

    #[test]
    fn a_group_is_the_functions_own_if_it_is_alone_behind_an_iommu() {
        let sysfs = tempfile::tempdir().unwrap();
        let address: PciAddress = "0000:05:08.1".parse().unwrap();
        let (devices, group) = (sysfs.path().join("devices"), sysfs.path().join("groups/42"));
        let device = devices.join("0000:05:08.1");
        for directory in [&device, &group.join("devices")] {
            std::fs::create_dir_all(directory).unwrap();
        }
        let why = || own_group_in(&devices, address).unwrap_err();
        assert!(why().contains("bound to no driver"));
        symlink("../../../bus/pci/drivers/mlx5_core", device.join("driver")).unwrap();
        assert!(why().contains("mlx5_core"));
        std::fs::remove_file(device.join("driver")).unwrap();
        symlink("../../../bus/pci/drivers/vfio-pci", device.join("driver")).unwrap();
        assert!(why().contains("no IOMMU group"));
        symlink("../../groups/42", device.join("iommu_group")).unwrap();
        std::fs::write(group.join("devices/0000:05:08.1"), "").unwrap();
        assert_eq!(own_group_in(&devices, address), Ok(42));
        std::fs::write(group.join("name"), "vfio-noiommu\n").unwrap();
        assert!(why().contains("noiommu"));
        std::fs::remove_file(group.join("name")).unwrap();
        std::fs::write(group.join("devices/0000:05:08.2"), "").unwrap();
        assert!(why().contains("shares IOMMU group 42"));
    }
}
