//! How much arithmetic a SAM of given sizes is.

use super::config::SamConfig;

impl SamConfig {
    /// Floating-point operations of the products in one pass of the image encoder. Norms, activations and relative
    /// positions, together below a twentieth, are left out.
    pub fn encoder_flops(&self) -> f64 {
        let (width, grid, hidden) = (self.embed_dim, self.grid(), self.encoder_mlp_dim());
        let positions = grid * grid;
        let patches = positions * 3 * self.patch_size.pow(2) * width;
        let block = |block: usize| {
            // Windows are padded to whole ones, and padding is computed as everything else.
            let (windows, side) = match self.window(block) {
                Some(side) => (grid.div_ceil(side).pow(2), side),
                None => (1, grid),
            };
            let tokens = side * side;
            windows * tokens * (4 * width * width + 2 * tokens * width) + positions * 2 * width * hidden
        };
        let blocks: usize = (0..self.depth).map(block).sum();
        let neck = positions * self.prompt_embed_dim * (width + 9 * self.prompt_embed_dim);
        2.0 * (patches + blocks + neck) as f64
    }

    /// Values of the image encoder's matrices.
    pub fn encoder_weights(&self) -> usize {
        let (width, out) = (self.embed_dim, self.prompt_embed_dim);
        let block = 4 * width * width + 2 * width * self.encoder_mlp_dim();
        3 * self.patch_size.pow(2) * width + self.depth * block + out * (width + 9 * out)
    }

    /// Floating-point operations of the mask decoder's linear layers that see the whole picture, for one phrase. The
    /// rest of the refiner is below a tenth.
    pub fn decoder_flops(&self) -> f64 {
        let (width, positions) = (self.prompt_embed_dim, self.grid().pow(2));
        // Keys and values of each attention to the picture, queries and outputs of each one from it.
        let projections = 4 * self.decoder_depth + 2;
        let upscaling = width * width + 4 * (width / 4) * (width / 2);
        2.0 * (positions * (projections * width * self.cross_attention_dim() + upscaling)) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_of_the_published_size() {
        let sam = SamConfig::vit_l();
        // By hand: 24 blocks of 12 · 1024² weights; 20 of them on 25 windows of 196 tokens for attention, 4 on 4,096.
        let linear = 2.0 * 24.0 * 8.0 * 1024f64.powi(2) * 4096.0;
        let windowed = 2.0 * 20.0 * 25.0 * 196.0 * (4.0 * 1024f64.powi(2) + 2.0 * 196.0 * 1024.0);
        let global = 2.0 * 4.0 * 4096.0 * (4.0 * 1024f64.powi(2) + 2.0 * 4096.0 * 1024.0);
        let rest = sam.encoder_flops() - linear - windowed - global;
        assert!((10e9..15e9).contains(&rest), "{rest}");
        assert_eq!(sam.encoder_weights(), 24 * 12 * 1024 * 1024 + 768 * 1024 + 256 * (1024 + 9 * 256));
    }
}
