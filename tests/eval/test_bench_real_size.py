from eval.bench_real_size import parameter_table


def test_the_table_counts_every_weight_once():
    by_name = {row["name"]: row for row in parameter_table()}
    for row in by_name.values():
        assert row["all"] == sum(row[part] for part in ("encoder", "sampler", "quantizer", "decoder")), row["name"]
    assert by_name["internvit-300m-448"]["tokens"] == 1024
    assert by_name["VFMTok, DINOv2-L 336"]["quantizer"] == 16384 * 12
    assert by_name["IDEAL, SigLIP2-L 384"]["tokens"] == 576
