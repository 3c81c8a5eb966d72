use super::*;

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

fn descriptor(media_type: &str) -> String {
    format!(r#"{{"mediaType":"{media_type}","digest":"{DIGEST}","size":7}}"#)
}

fn manifest_of(config: &str, layers: &[&str]) -> String {
    let layers: Vec<_> = layers.iter().map(|layer| descriptor(layer)).collect();
    format!(r#"{{"schemaVersion":2,"config":{},"layers":[{}]}}"#, descriptor(config), layers.join(","))
}

fn parse(text: &str, media_type: &str) -> Result<Document, ImageError> {
    Document::parse(text.as_bytes(), media_type, "it")
}

#[test]
fn manifests_of_both_kinds_are_read() {
    for (config, layer, compression) in [
        (OCI_CONFIG, "application/vnd.oci.image.layer.v1.tar", Compression::None),
        (OCI_CONFIG, GZIP, Compression::Gzip),
        (OCI_CONFIG, "application/vnd.oci.image.layer.v1.tar+zstd", Compression::Zstd),
        (DOCKER_CONFIG, "application/vnd.docker.image.rootfs.diff.tar.gzip", Compression::Gzip),
    ] {
        let Document::Manifest(manifest) = parse(&manifest_of(config, &[layer]), OCI_MANIFEST).unwrap() else {
            panic!("no manifest")
        };
        assert_eq!(manifest.layers[0].1, compression);
        assert_eq!(manifest.layers[0].0.size, 7);
    }
}

#[test]
fn what_cannot_be_used_is_refused_by_name() {
    let too_many = vec![GZIP; LAYERS_MAX + 1];
    let both = manifest_of(OCI_CONFIG, &[GZIP]).replacen('{', r#"{"manifests":[],"#, 1);
    for (text, media_type, kind, says) in [
        ("{}".into(), "", "invalid_image", "schemaVersion"),
        ("{".into(), "", "invalid_image", "EOF"),
        (r#"{"schemaVersion":2}"#.into(), "", "invalid_image", "either config and layers"),
        (r#"{"schemaVersion":3,"manifests":[]}"#.into(), "", "invalid_image", "not 2"),
        (r#"{"schemaVersion":1,"fsLayers":[]}"#.into(), "", "unsupported", "2014"),
        (manifest_of(OCI_CONFIG, &[]), "", "invalid_image", "0 layers"),
        (manifest_of(OCI_CONFIG, &too_many), "", "invalid_image", "128 layers"),
        (manifest_of(OCI_CONFIG, &["application/x-lzma"]), "", "unsupported", "application/x-lzma"),
        (
            manifest_of(OCI_CONFIG, &["application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"]),
            "",
            "unsupported",
            "outside of registries",
        ),
        (
            manifest_of(OCI_CONFIG, &["application/vnd.oci.image.layer.nondistributable.v1.tar"]),
            "",
            "unsupported",
            "outside of registries",
        ),
        (manifest_of("application/vnd.cncf.helm.config.v1+json", &[GZIP]), "", "unsupported", "helm"),
        (manifest_of(OCI_CONFIG, &[GZIP]), "text/html", "unsupported", "text/html"),
        (manifest_of(OCI_CONFIG, &[GZIP]), OCI_INDEX, "invalid_image", "says that it is a index"),
        (both, "", "invalid_image", "either config and layers"),
        (manifest_of(OCI_CONFIG, &[GZIP]).replace(":7", ":-7"), "", "invalid_image", "invalid value"),
        (manifest_of(OCI_CONFIG, &[GZIP]).replace("sha256:e3", "sha256:E3"), "", "invalid_image", "hexadecimal"),
        (format!("{}{}", " ".repeat(DOCUMENT_BYTES_MAX as usize), "{}"), "", "invalid_image", "more than"),
    ] {
        let error = parse(&text, media_type).expect_err(&text[..text.len().min(200)]);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
}

fn index(platforms: &[&str]) -> Index {
    let manifests: Vec<_> = platforms
        .iter()
        .enumerate()
        .map(|(at, platform)| {
            let mut parts = platform.split('/');
            let mut part = || parts.next().unwrap_or_default();
            let platform = match *platform {
                "" => String::new(),
                _ => format!(r#","platform":{{"os":"{}","architecture":"{}","variant":"{}"}}"#, part(), part(), part()),
            };
            format!(r#"{{"mediaType":"{OCI_MANIFEST}","digest":"sha256:{at:064x}","size":1{platform}}}"#)
        })
        .collect();
    let text = format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[{}]}}"#, manifests.join(","));
    match parse(&text, "").unwrap() {
        Document::Index(index) => index,
        Document::Manifest(_) => panic!("no index"),
    }
}

#[test]
fn an_index_gives_what_runs_here() {
    let amd64 = Platform { architecture: "amd64".into(), os: "linux".into(), variant: None };
    let arm64 = Platform { architecture: "arm64".into(), os: "linux".into(), variant: None };
    for (platform, offered, chosen) in [
        (&amd64, &["linux/arm64/v8", "linux/amd64", "unknown/unknown"][..], Some(1)),
        (&amd64, &["linux/amd64/v3", "linux/amd64/v2", "linux/amd64/v1"], Some(2)),
        (&amd64, &["linux/amd64/v3"], None),
        (&amd64, &["windows/amd64", "linux/386"], None),
        (&arm64, &["linux/amd64", "linux/arm/v7", "linux/arm64/v8"], Some(2)),
        (&amd64, &[""], Some(0)),
        (&amd64, &["", "linux/amd64"], Some(1)),
        (&amd64, &["", ""], None),
        (&amd64, &[], None),
    ] {
        let index = index(offered);
        let found = index.choose(platform, "it").ok().map(|found| found.digest.hex());
        assert_eq!(found, chosen.map(|at: usize| format!("{at:064x}")), "{offered:?}");
    }
    let error =
        index(&["linux/arm/v7", "windows/amd64", "unknown/unknown", "linux/s390x"]).choose(&amd64, "it").unwrap_err();
    assert_eq!(error.to_string(), "it has nothing for linux/amd64; it has linux/arm/v7, linux/s390x, windows/amd64");
}
