//! Where models compute: the processor, or a CUDA device in builds with the feature `cuda`.

use std::str::FromStr;

use candle_core::Device;

use crate::error::{Error, Result};

/// A device as users name it: `cpu`, `cuda` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// CUDA if this build has it and the machine has such a device, else the processor.
    #[default]
    Best,
    /// The processor.
    Cpu,
    /// The CUDA device of this number; without one, that of `LOCAL_RANK`, which launchers of several processes set, else
    /// the first.
    Cuda(Option<usize>),
}

impl FromStr for DeviceChoice {
    type Err = String;

    /// `cpu`, `cuda` or `cuda:N`; the error says so.
    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_prefix("cuda:").map(str::parse::<usize>);
        match (text, number) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(None)),
            (_, Some(Ok(ordinal))) => Ok(Self::Cuda(Some(ordinal))),
            _ => Err("expected cpu, cuda or cuda:N with the number of a device".to_owned()),
        }
    }
}

impl DeviceChoice {
    /// The device itself.
    ///
    /// # Errors
    /// [`Error::Request`] if CUDA is asked for and this build does not have it, or the driver, its libraries or the
    /// device are not there; if `LOCAL_RANK` is no number.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Best => Ok(cuda(local_rank()?).unwrap_or(Device::Cpu)),
            Self::Cuda(Some(ordinal)) => cuda(ordinal),
            Self::Cuda(None) => cuda(local_rank()?),
        }
    }
}

/// The number of this process among those of its machine, 0 unless a launcher has set `LOCAL_RANK`.
fn local_rank() -> Result<usize> {
    let Some(text) = std::env::var_os("LOCAL_RANK") else { return Ok(0) };
    text.to_str().and_then(|text| text.trim().parse().ok()).ok_or_else(|| {
        let what = format!("LOCAL_RANK is `{}`, expected a number", text.to_string_lossy());
        Error::request(what, "launchers set it; name the device instead: cuda:N, or cpu")
    })
}

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize) -> Result<Device> {
    flmm_cuda::open(ordinal).map_err(|error| {
        // The driver's own text; candle's has a backtrace behind it.
        let reason = error.to_string();
        let reason = reason.lines().next().unwrap_or_default().trim_end();
        Error::request(
            format!("the CUDA device {ordinal} cannot be used: {reason}"),
            "`nvidia-smi -L` lists devices; CUDA 13's libraries must be found too (docs/cuda.md), or use the device cpu",
        )
    })
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Result<Device> {
    Err(Error::request(
        "this build computes on the processor only",
        "build with `--features cuda` (docs/cuda.md), or use the device cpu",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_elsewhere() {
        let named = |text: &str| text.parse::<DeviceChoice>();
        assert_eq!(named("cpu"), Ok(DeviceChoice::Cpu));
        assert_eq!(named("cuda"), Ok(DeviceChoice::Cuda(None)));
        assert_eq!(named("cuda:3"), Ok(DeviceChoice::Cuda(Some(3))));
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CPU"] {
            assert!(named(wrong).unwrap_err().contains("cuda:N"), "{wrong}");
        }
    }

    #[test]
    fn there_is_always_the_processor() {
        assert!(DeviceChoice::Cpu.open().unwrap().is_cpu());
        assert!(DeviceChoice::Best.open().is_ok());
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error_with_a_hint() {
        let error = DeviceChoice::Cuda(Some(4_000)).open().unwrap_err();
        assert!(error.hint().unwrap().contains("docs/cuda.md"), "{error}");
    }
}
