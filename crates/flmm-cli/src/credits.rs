//! Whose work is inside.

/// The credits that the licences of included works ask for.
pub(crate) fn text() -> String {
    format!(
        "flmm is copyright The flmm authors, under the MIT licence or the Apache Licence 2.0, at your choice.\n\n\
         {}\nThe embedded model was trained on such pictures.\n\n\
         Letters on overlays are Noto Sans Mono, under the SIL Open Font Licence 1.1.\n",
        flmm_data::world::ATTRIBUTION,
    )
}
