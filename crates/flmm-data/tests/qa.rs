//! Question-answering files: what the world writes comes back, tables of the hub's form are read, bad files are named.

use flmm_data::qa::write::{Column, base64, parquet, tsv};
use flmm_data::qa::{Benchmark, QaData, Question};
use flmm_data::world::{Level, Split, WorldConfig, generate, write};
use std::path::Path;

const COUNT: u64 = 12;

fn world() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("world");
    write(&out, Split::Val, COUNT, 5, Level::Two, &|_| {}).unwrap();
    (folder, out)
}

/// A one-coloured picture file.
fn picture(shade: u8) -> Vec<u8> {
    let image = image::RgbImage::from_pixel(9, 7, image::Rgb([shade, 0, 255 - shade]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn put(root: &Path, path: &str, bytes: &[u8]) {
    let path = root.join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

fn texts(values: &[&str]) -> Column {
    Column::Texts(values.iter().map(|&text| text.to_owned()).collect())
}

fn open(root: &Path, benchmark: Benchmark) -> QaData {
    QaData::open(root, benchmark).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn every_benchmark_of_a_world_is_read() {
    let (_folder, out) = world();
    for benchmark in Benchmark::ALL {
        let data = open(&out, benchmark);
        assert!(data.questions.len() > 4, "{benchmark:?}: {}", data.questions.len());
        for index in [0, data.questions.len() - 1, 1] {
            let image = data.picture(index).unwrap();
            assert!(image.width() >= 180, "{benchmark:?}");
        }
        for question in &data.questions {
            assert!(!question.question.is_empty() && !question.answers.is_empty(), "{question:?}");
        }
    }
}

/// Other languages of MMBench are told by folders below its own, not by those above it.
#[test]
fn a_data_root_may_have_any_name() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("cn/cc");
    write(&root, Split::Val, COUNT, 5, Level::Two, &|_| {}).unwrap();
    let questions = open(&root, Benchmark::MmBench).questions;
    let mmbench = root.join("qa/mmbench");
    std::fs::create_dir(mmbench.join("cn")).unwrap();
    std::fs::copy(mmbench.join("mmbench_dev_world.tsv"), mmbench.join("cn/mmbench_dev_cn.tsv")).unwrap();
    assert_eq!(open(&root, Benchmark::MmBench).questions, questions);
}

#[test]
fn a_world_for_training_has_no_questions() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("world");
    write(&out, Split::Train, 1, 5, Level::One, &|_| {}).unwrap();
    assert!(!out.join("qa").exists() && !out.join("coco/val2014").exists());
    let error = QaData::open(&out, Benchmark::Pope).unwrap_err();
    assert!(error.to_string().contains("qa/pope") && error.hint().unwrap().contains("lmms-lab/POPE"));
}

#[test]
fn answers_are_those_of_the_scene() {
    let (_folder, out) = world();
    let scenes: Vec<_> =
        (0..COUNT).map(|index| generate(&WorldConfig::new(Level::Two), Split::Val, 5, index)).collect();
    let known = |question: &str| {
        let all = scenes.iter().flat_map(|scene| scene.texts.questions.iter().chain(&scene.texts.reasoning));
        all.filter(|q| q.question == question).map(|q| q.answer.clone()).collect::<Vec<_>>()
    };
    for question in open(&out, Benchmark::Pope).questions {
        let gold = if question.answers[0] == "yes" { "Yes" } else { "No" };
        assert!(known(&question.question).iter().any(|answer| answer.starts_with(gold)), "{question:?}");
    }
    for question in open(&out, Benchmark::Mme).questions {
        let text = question.question.strip_suffix(" Please answer yes or no.").unwrap();
        assert!(known(text).iter().any(|answer| answer.starts_with(&question.answers[0])), "{question:?}");
    }
    for benchmark in [Benchmark::MmBench, Benchmark::Ai2d] {
        for question in open(&out, benchmark).questions {
            assert_eq!(question.options.len(), 4);
            let letter = question.answers[0].chars().next().unwrap();
            let right = &question.options.iter().find(|(option, _)| *option == letter).unwrap().1;
            assert!(known(&question.question).iter().any(|a| a.contains(right.as_str())), "{question:?}");
        }
    }
    for question in open(&out, Benchmark::VqaV2).questions {
        assert_eq!(question.answers.len(), 10);
    }
}

#[test]
fn rotated_copies_share_question_and_right_option() {
    let (_folder, out) = world();
    let data = open(&out, Benchmark::MmBench);
    let right = |question: &Question| {
        let letter = question.answers[0].chars().next();
        question.options.iter().find(|(option, _)| Some(*option) == letter).unwrap().1.clone()
    };
    for (index, copy) in data.questions.iter().enumerate() {
        let base = data.questions.iter().position(|base| base.id == copy.group).unwrap();
        assert_eq!(right(copy), right(&data.questions[base]));
        assert_eq!(copy.question, data.questions[base].question);
        if index % 7 == 0 {
            assert_eq!(data.picture(index).unwrap(), data.picture(base).unwrap());
        }
    }
}

/// Pictures are found whatever the order of asking and the size of the groups.
#[test]
fn pictures_inside_tables_come_in_any_order() {
    for rows_per_group in [1, 3, 100] {
        let folder = tempfile::tempdir().unwrap();
        let shades: Vec<u8> = (0..7).map(|n| n * 30).collect();
        let names: Vec<String> = shades.iter().map(u8::to_string).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let columns = [
            ("question_id", texts(&names)),
            ("image", Column::Pictures(shades.iter().map(|&shade| picture(shade)).collect())),
            ("question", texts(&names)),
            ("answer", texts(&["Yes"; 7])),
            ("category", texts(&["count"; 7])),
        ];
        let table = parquet(&columns, rows_per_group).unwrap();
        put(folder.path(), "qa/mme/data/test-00000-of-00001.parquet", &table);
        let data = open(folder.path(), Benchmark::Mme);
        for index in [0, 1, 2, 6, 3, 3, 0, 5, 4] {
            assert_eq!(data.picture(index).unwrap().get_pixel(0, 0).0[0], shades[index], "{rows_per_group}");
        }
        assert!(data.picture(7).is_err());
    }
}

#[test]
fn the_hubs_tables_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let pictures = |count: u8| Column::Pictures((0..count).map(picture).collect());
    let table = |columns: &[(&str, Column)]| parquet(columns, 2).unwrap();
    let three = ["a", "b", "c"];
    put(
        root,
        "qa/pope/data/test-00000-of-00001.parquet",
        &table(&[
            ("question_id", Column::Numbers(vec![1, 2, 1])),
            ("question", texts(&three)),
            ("answer", texts(&["yes", "no", "yes"])),
            ("category", texts(&["random", "random", "popular"])),
            ("image", pictures(3)),
        ]),
    );
    // Other configurations of the same data set are not read twice.
    put(root, "qa/pope/Full/random-00000-of-00001.parquet", b"not read");
    put(
        root,
        "qa/gqa/testdev_balanced_instructions/testdev-00000-of-00001.parquet",
        &table(&[
            ("id", texts(&["1", "2", "3"])),
            ("imageId", texts(&["n2", "n1", "n2"])),
            ("question", texts(&three)),
            ("answer", texts(&three)),
        ]),
    );
    put(
        root,
        "qa/gqa/testdev_balanced_images/testdev-00000-of-00001.parquet",
        &table(&[("id", texts(&["n1", "n2"])), ("image", pictures(2))]),
    );
    let ten = |text: &str| vec![text.to_owned(); 10];
    put(
        root,
        "qa/vqav2/data/validation-00000-of-00001.parquet",
        &table(&[
            ("question_id", Column::Numbers(vec![11, 12, 13])),
            ("question", texts(&three)),
            ("answers", Column::Groups("answer", vec![ten("x"), ten("y"), ten("z")])),
            ("image", pictures(3)),
        ]),
    );
    put(
        root,
        "qa/mmvet/data/test-00000-of-00001.parquet",
        &table(&[
            ("question_id", texts(&["v1_0", "v1_1", "v1_2"])),
            ("question", texts(&three)),
            ("answer", texts(&three)),
            ("capability", texts(&["rec", "ocr,math", "spat"])),
            ("image", pictures(3)),
        ]),
    );
    put(
        root,
        "qa/llavabench/data/train-00000-of-00001.parquet",
        &table(&[
            ("question_id", Column::Numbers(vec![0, 1, 2])),
            ("question", texts(&three)),
            ("gpt_answer", texts(&three)),
            ("category", texts(&["conv", "detail", "complex"])),
            ("caption", texts(&three)),
            ("image", pictures(3)),
        ]),
    );
    put(
        root,
        "qa/mmbench/en/dev-00000-of-00001.parquet",
        &table(&[
            ("index", Column::Numbers(vec![3, 1_000_003])),
            ("question", texts(&["q", "q"])),
            ("hint", texts(&["nan", "h"])),
            ("A", texts(&["x", "y"])),
            ("B", texts(&["y", "x"])),
            ("C", texts(&["nan", "nan"])),
            ("answer", texts(&["A", "B"])),
            ("category", texts(&["c", "c"])),
            ("L2-category", texts(&["l", "l"])),
            ("image", pictures(2)),
        ]),
    );
    put(root, "qa/mmbench/en/test-00000-of-00001.parquet", b"not read");
    put(root, "qa/mmbench/cn/dev-00000-of-00001.parquet", b"not read");

    let pope = open(root, Benchmark::Pope).questions;
    assert_eq!(pope.iter().map(|q| q.id.as_str()).collect::<Vec<_>>(), ["random-1", "random-2", "popular-1"]);
    let gqa = open(root, Benchmark::Gqa);
    let shade = |index| gqa.picture(index).unwrap().get_pixel(0, 0).0[0];
    assert_eq!([shade(0), shade(1), shade(2)], [1, 0, 1]);
    let vqa = open(root, Benchmark::VqaV2).questions;
    assert_eq!((vqa[1].id.as_str(), &vqa[1].answers), ("12", &ten("y")));
    assert_eq!(open(root, Benchmark::MmVet).questions[1].capabilities, ["ocr", "math"]);
    assert_eq!(open(root, Benchmark::LlavaBench).questions[2].category, "complex");
    let mmbench = open(root, Benchmark::MmBench).questions;
    assert_eq!((mmbench[0].hint.as_str(), mmbench[1].hint.as_str()), ("", "h"));
    assert_eq!(mmbench[1].options, [('A', "y".to_owned()), ('B', "x".to_owned())]);
    assert_eq!((mmbench[1].group.as_str(), mmbench[1].l2_category.as_str()), ("3", "l"));
}

#[test]
fn bad_files_are_named_with_row_and_column() {
    let fails = |path: &str, bytes: &[u8], benchmark, wanted: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        put(folder.path(), path, bytes);
        if benchmark == Benchmark::Pope {
            put(folder.path(), "qa/pope/coco_pope_popular.json", b"");
            put(folder.path(), "qa/pope/coco_pope_adversarial.json", b"");
        }
        let error = QaData::open(folder.path(), benchmark).and_then(|data| data.picture(0)).unwrap_err();
        let text = format!("{error}\nhint: {}", error.hint().unwrap_or_default());
        for part in wanted {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    };
    let data = "qa/mme/data/test.parquet";
    let column = |name: &'static str, values: &[&str]| (name, texts(values));
    fails(data, b"PAR1nonsensePAR1", Benchmark::Mme, &["test.parquet", "not a readable Parquet file"]);
    fails(data, b"", Benchmark::Mme, &["test.parquet"]);
    let broken = parquet(
        &[
            column("question_id", &["a"]),
            ("image", Column::Pictures(vec![b"no picture".to_vec()])),
            column("question", &["q"]),
            column("answer", &["Yes"]),
            column("category", &["count"]),
        ],
        1,
    )
    .unwrap();
    fails(data, &broken, Benchmark::Mme, &["test.parquet, row 1", "not a picture"]);
    // The column chunk of the pictures is overwritten, the footer is whole.
    let mut damaged = broken.clone();
    damaged[4..40].fill(0xff);
    fails(data, &damaged, Benchmark::Mme, &["test.parquet"]);
    let no_answer = parquet(&[column("question_id", &["a"]), column("question", &["q"])], 1).unwrap();
    fails(data, &no_answer, Benchmark::Mme, &["row 1", "no `answer`", "question_id, question"]);

    let header = ["index", "question", "A", "B", "answer", "image"];
    let row = |answer: &str, image: String| {
        ["7", "q", "x", "y", answer].iter().map(|&t| t.to_owned()).chain([image]).collect::<Vec<_>>()
    };
    let path = "qa/mmbench/mmbench_dev.tsv";
    let table = |answer: &str, image: &str| tsv(&header, &[row(answer, image.to_owned())]).into_bytes();
    fails(path, &table("C", &base64(&picture(1))), Benchmark::MmBench, &["row 1", "answer \"C\""]);
    fails(path, &table("", &base64(&picture(1))), Benchmark::MmBench, &["row 1", "dev split"]);
    fails(path, &table("A", "6"), Benchmark::MmBench, &["row 1", "neither a picture in base64"]);
    fails(path, &table("A", &"?".repeat(100)), Benchmark::MmBench, &["row 1", "not base64"]);
    fails(path, b"index\timage\n1\n", Benchmark::MmBench, &["row 1: 1 cells, the header has 2"]);
    fails(path, b"index\tquestion\n1\n", Benchmark::MmBench, &["no column `image`"]);
    let twice = tsv(&header, &[row("A", base64(&picture(1))), row("B", "7".into())]).into_bytes();
    fails(path, &twice, Benchmark::MmBench, &["`7` occurs twice"]);

    let line = |image: &str| format!(r#"{{"question_id":1,"image":"{image}","text":"q","label":"yes"}}"#);
    let path = "qa/pope/coco_pope_random.json";
    fails(path, b"{", Benchmark::Pope, &["coco_pope_random.json", "line 1"]);
    fails(path, line("../a.jpg").as_bytes(), Benchmark::Pope, &["row 1", "expected a file name"]);
    fails(path, line("a.jpg").as_bytes(), Benchmark::Pope, &["coco/val2014/a.jpg"]);
    let questions = "qa/vqav2/v2_OpenEnded_mscoco_val2014_questions.json";
    let vqa = |question: &str, annotation: &str| {
        let folder = tempfile::tempdir().unwrap();
        put(folder.path(), questions, format!(r#"{{"questions":[{question}]}}"#).as_bytes());
        let path = "qa/vqav2/v2_mscoco_val2014_annotations.json";
        put(folder.path(), path, format!(r#"{{"annotations":[{annotation}]}}"#).as_bytes());
        QaData::open(folder.path(), Benchmark::VqaV2)
    };
    let (question, answers) = (
        r#"{"question_id":5,"image_id":9,"question":"q"}"#,
        r#"{"question_id":5,"answers":[{"answer":"a"}]}"#,
    );
    let read = vqa(question, answers).unwrap().questions.remove(0);
    assert_eq!((read.id.as_str(), read.answers, read.group.as_str()), ("5", vec!["a".to_owned()], "9"));
    for (question, answers, wanted) in [
        (question, "", "question 5 has no answers"),
        (question, &*format!("{answers},{answers}"), "question 5 is annotated twice"),
        (question, r#"{"question_id":5,"answers":["a"]}"#, "invalid type"),
        (r#"{"question_id":"x","image_id":9,"question":"q"}"#, answers, "is not an id"),
    ] {
        let error = vqa(question, answers).unwrap_err().to_string();
        assert!(error.contains(wanted) && error.contains("v2_"), "{wanted}: {error}");
    }
    fails("qa/gqa/notes.txt", b"", Benchmark::Gqa, &["holds no questions", "lmms-lab/GQA"]);
}

/// Whatever single byte is wrong: an error or another value, never a panic.
#[test]
fn damaged_tables_never_panic() {
    let answers: Vec<Vec<String>> = (0..3).map(|n| vec![format!("a{n}"); n]).collect();
    let columns = [
        ("question_id", Column::Numbers(vec![1, 2, 3])),
        ("question", texts(&["a", "b", "c"])),
        ("answers", Column::Groups("answer", answers)),
        ("image", Column::Pictures((0..3).map(picture).collect())),
    ];
    let whole = parquet(&columns, 2).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = "qa/vqav2/data/validation.parquet";
    for at in 0..whole.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut damaged = whole.clone();
            damaged[at] ^= flip;
            put(folder.path(), path, &damaged);
            if let Ok(data) = QaData::open(folder.path(), Benchmark::VqaV2) {
                (0..data.questions.len()).for_each(|index| drop(data.picture(index)));
            }
        }
    }
    for length in 0..whole.len() {
        put(folder.path(), path, &whole[..length]);
        assert!(QaData::open(folder.path(), Benchmark::VqaV2).is_err(), "{length}");
    }
}
