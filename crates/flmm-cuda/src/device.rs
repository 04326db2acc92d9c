//! Opening a device.

use candle_core::{Device, Result};

/// The CUDA device number `ordinal`.
///
/// All threads use one stream, so that what one of them computes may be used by another. (candle's own default is the
/// stream of each thread, between which nothing waits.)
///
/// # Errors
/// What the driver says: no driver, no such device, a library that is missing.
#[allow(unsafe_code)]
pub fn open(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    // SAFETY: events order the work of several streams. There is one: nothing here or in candle makes another.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    Ok(device)
}
