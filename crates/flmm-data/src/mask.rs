//! Binary masks of a whole picture.

/// A binary mask of the whole picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    /// Pixels per row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Row-major, `true` inside.
    pub data: Vec<bool>,
}

impl Mask {
    /// The mask whose pixel (x, y) is `inside(x, y)`.
    pub fn from_fn(width: u32, height: u32, mut inside: impl FnMut(u32, u32) -> bool) -> Self {
        let mut data = Vec::with_capacity(width as usize * height as usize);
        for y in 0..height {
            data.extend((0..width).map(|x| inside(x, y)));
        }
        Self { width, height, data }
    }

    /// Whether pixel (x, y) is inside; `false` outside the picture.
    pub fn get(&self, x: u32, y: u32) -> bool {
        x < self.width && y < self.height && self.data[y as usize * self.width as usize + x as usize]
    }

    /// Number of pixels inside.
    pub fn area(&self) -> u32 {
        self.data.iter().filter(|&&inside| inside).count() as u32
    }

    /// Tight box x, y, width, height of what is inside; zeros for an empty mask.
    pub fn bbox(&self) -> [u32; 4] {
        let (mut x0, mut y0, mut x1, mut y1) = (self.width, self.height, 0, 0);
        for (y, row) in self.data.chunks(self.width.max(1) as usize).enumerate() {
            if let (Some(first), Some(last)) = (row.iter().position(|&b| b), row.iter().rposition(|&b| b)) {
                (x0, x1) = (x0.min(first as u32), x1.max(last as u32 + 1));
                (y0, y1) = (y0.min(y as u32), y as u32 + 1);
            }
        }
        if x1 == 0 { [0; 4] } else { [x0, y0, x1 - x0, y1 - y0] }
    }
}

/// The library's mask of the same pixels.
impl From<&Mask> for flmm::masks::Mask {
    fn from(mask: &Mask) -> Self {
        Self::from_fn(mask.width as usize, mask.height as usize, |x, y| mask.get(x as u32, y as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_knows_its_box() {
        let mut mask = Mask { width: 4, height: 3, data: vec![false; 12] };
        assert_eq!((mask.area(), mask.bbox()), (0, [0; 4]));
        mask.data[4 + 1] = true;
        mask.data[8 + 3] = true;
        assert_eq!((mask.area(), mask.bbox()), (2, [1, 1, 3, 2]));
        assert!(mask.get(3, 2) && !mask.get(4, 2) && !mask.get(0, 0));
    }
}
