//! The page: HTML without any request to elsewhere, pictures inside.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flmm::overlay::draw_mask;
use flmm::{Error, Result};
use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;
use image::imageops::{self, FilterType};

use super::{Failure, Kind, Report};
use crate::runs::Runs;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Longest side of an embedded picture, pixels, and its JPEG quality.
const SIDE: u32 = 320;
const QUALITY: u8 = 82;
/// Numbers of the overlay's colours: the predicted and the true mask.
const PREDICTED: usize = 3;
const TRUE: usize = 2;

/// The whole page. `read` opens a picture of the data; `progress` is called once per failure, when its pictures are drawn.
///
/// # Errors
/// Those of `read`; [`Error::Request`] if a mask has another size than its picture.
pub fn page(
    report: &Report,
    title: &str,
    read: impl Fn(&str) -> Result<RgbImage>,
    mut progress: impl FnMut(),
) -> Result<String> {
    let mut rows = String::new();
    // Samples of one picture follow each other, so that it is read once.
    let mut order: Vec<&Failure> = report.failures.iter().collect();
    order.sort_by(|a, b| (&a.task, &a.picture, &a.id).cmp(&(&b.task, &b.picture, &b.id)));
    let mut open: Option<(&str, RgbImage)> = None;
    for failure in order {
        if open.as_ref().is_none_or(|(path, _)| *path != failure.picture) {
            open = Some((&failure.picture, read(&failure.picture)?));
        }
        if let Some((_, picture)) = &open {
            row(&mut rows, failure, picture)?;
        }
        progress();
    }
    let title = escaped(title);
    let head = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n"
    );
    let mut body = format!("<body>\n<header>\n<h1>{title}</h1>\n{}</header>\n<main>\n", summary(report));
    body += &controls(report);
    body += "<div class=\"scroll\">\n<table id=\"failures\">\n<thead><tr>";
    for (name, key) in [
        ("Predicted", ""),
        ("Should be", ""),
        ("Failure", "kind"),
        ("Phrase", "phrase"),
        ("IoU", "iou"),
        ("Size", "size"),
        ("Task", "task"),
        ("Sample", "id"),
    ] {
        body += &match key {
            "" => format!("<th scope=\"col\">{name}</th>"),
            key => format!(
                "<th scope=\"col\" aria-sort=\"none\"><button type=\"button\" data-key=\"{key}\">{name}</button></th>"
            ),
        };
    }
    body += &format!("</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n");
    if report.failures.is_empty() {
        body += "<p class=\"none\">No phrase failed.</p>\n";
    }
    Ok(format!("{head}{body}</main>\n<script>\n{SCRIPT}</script>\n</body>\n</html>\n"))
}

/// Per task: how many phrases failed in which way, and the metrics.
fn summary(report: &Report) -> String {
    let mut text = String::from(
        "<div class=\"scroll\"><table class=\"summary\">\n<thead><tr><th scope=\"col\">Task</th><th scope=\"col\">Phrases</th>",
    );
    Kind::ALL.iter().for_each(|kind| text += &format!("<th scope=\"col\">{}</th>", kind.name()));
    text += "<th scope=\"col\">Metrics</th></tr></thead>\n<tbody>\n";
    for (task, (phrases, counts)) in &report.counts {
        let _ = write!(text, "<tr><th scope=\"row\">{}</th><td>{phrases}</td>", escaped(task));
        for kind in Kind::ALL {
            let count = counts.get(&kind).copied().unwrap_or(0);
            let share = 100.0 * count as f64 / (*phrases).max(1) as f64;
            let _ = write!(text, "<td>{count} <small>{share:.1} %</small></td>");
        }
        let metrics = report.results.get(task).map(|result| {
            let numbers =
                result.metrics.0.iter().map(|(name, value)| format!("{} {value:.1}", escaped(name)));
            numbers.collect::<Vec<_>>().join(" · ")
        });
        let _ = writeln!(text, "<td>{}</td></tr>", metrics.unwrap_or_default());
    }
    text + "</tbody>\n</table></div>\n"
}

fn controls(report: &Report) -> String {
    let mut text =
        String::from("<form class=\"controls\" onsubmit=\"return false\">\n<fieldset><legend>Show</legend>");
    for kind in Kind::ALL {
        let shown = report.failures.iter().filter(|failure| failure.kind == kind).count();
        let name = kind.name();
        let _ = write!(
            text,
            "<label><input type=\"checkbox\" name=\"kind\" value=\"{name}\" checked> {name} <small>{shown}</small></label>"
        );
    }
    text + "</fieldset>\n<label>Search <input type=\"search\" id=\"search\" placeholder=\"phrase, sample, answer\"></label>\n\
            <output id=\"shown\"></output>\n</form>\n"
}

fn row(out: &mut String, failure: &Failure, picture: &RgbImage) -> Result<()> {
    let pixels = f64::from(picture.width()) * f64::from(picture.height());
    let size = 100.0 * failure.truth.area() as f64 / pixels.max(1.0);
    let predicted = match &failure.predicted {
        Some(mask) => image_tag(&drawn(picture, mask, PREDICTED)?, "predicted mask")?,
        None => "<span class=\"nothing\">no mask</span>".to_owned(),
    };
    let truth = image_tag(&drawn(picture, &failure.truth, TRUE)?, "true mask")?;
    let kind = failure.kind.name();
    let named = match failure.predicted_phrase.as_str() {
        "" => String::new(),
        text => format!("<div class=\"as\">marked as “{}”</div>", escaped(text)),
    };
    let detail = |name: &str, text: &str| match text.trim() {
        "" => String::new(),
        text => format!("<details><summary>{name}</summary>{}</details>", escaped(text)),
    };
    let _ = writeln!(
        out,
        "<tr data-kind=\"{kind}\" data-phrase=\"{phrase}\" data-iou=\"{iou:.6}\" data-size=\"{size:.6}\" data-task=\"{task}\" data-id=\"{id}\">\
         <td>{predicted}</td><td>{truth}</td><td><span class=\"kind {class}\">{kind}</span></td>\
         <td>{phrase}{named}{prompt}{answer}</td><td class=\"number\">{iou:.2}</td><td class=\"number\">{size:.1} %</td><td>{task}</td><td>{id}</td></tr>",
        class = kind.replace(' ', "-").to_lowercase(),
        phrase = escaped(failure.phrase.trim()),
        iou = failure.iou,
        task = escaped(&failure.task),
        id = escaped(&failure.id),
        prompt = detail("prompt", &failure.prompt),
        answer = detail("answer", &failure.answer),
    );
    Ok(())
}

/// The picture with one mask, small.
fn drawn(picture: &RgbImage, mask: &Runs, colour: usize) -> Result<RgbImage> {
    let drawn = draw_mask(picture, &mask.to_mask(), colour)?;
    let scale = f64::from(SIDE) / f64::from(drawn.width().max(drawn.height()).max(1));
    let side = |length: u32| ((f64::from(length) * scale).round() as u32).max(1);
    Ok(imageops::resize(&drawn, side(drawn.width()), side(drawn.height()), FilterType::Triangle))
}

fn image_tag(picture: &RgbImage, what: &str) -> Result<String> {
    let mut bytes = Vec::new();
    picture.write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, QUALITY)).map_err(|e| {
        Error::image(format!("a picture cannot be written as JPEG: {e}"), "report this with the picture")
    })?;
    let (width, height) = picture.dimensions();
    Ok(format!(
        "<img loading=\"lazy\" width=\"{width}\" height=\"{height}\" alt=\"{what}\" src=\"data:image/jpeg;base64,{}\">",
        STANDARD.encode(bytes)
    ))
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() && c != '\n' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_models_cannot_become_markup() {
        assert_eq!(escaped("<b a=\"x\">&'\u{1b}"), "&lt;b a=&quot;x&quot;&gt;&amp;&#39;\u{fffd}");
    }

    #[test]
    fn a_page_asks_for_nothing_and_shows_both_masks() {
        let failure = Failure {
            task: "png".into(),
            id: "7".into(),
            kind: Kind::LowIou,
            iou: 0.25,
            phrase: "the <dog>".into(),
            predicted_phrase: String::new(),
            prompt: String::new(),
            answer: "A \"dog\".".into(),
            picture: "1.jpg".into(),
            predicted: Some(Runs::from_fn(30, 40, |x, _| x < 9)),
            truth: Runs::from_fn(30, 40, |x, _| x < 20),
        };
        let report = Report { failures: vec![failure], ..Report::default() };
        let mut drawn = 0;
        let page = page(&report, "run", |_| Ok(RgbImage::new(40, 30)), || drawn += 1).unwrap();
        assert_eq!((drawn, page.matches("data:image/jpeg").count()), (1, 2));
        assert!(page.contains("the &lt;dog&gt;") && !page.contains("the <dog>"));
        assert!(!page.contains("http://") && !page.contains("https://"));
    }
}
