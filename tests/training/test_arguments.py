# Copyright 2026 The diffusers-greedy-grow authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import re

import pytest
import yaml

from diffusers_greedy_grow.training import parse_arguments


def test_values_for_each_resolution_or_stage(tmp_path):
    _, model, training = parse_arguments(["--resolutions", "16", "32", "64", "--detail_steps", "7", "5"], "")
    assert training.train_batch_size == [32, 16, 16] and training.detail_steps == [7, 5]
    assert len(training.learning_rate) == 3 and len(model.block_out_channels) == len(training.joint_steps) == 2
    _, _, training = parse_arguments(["--resolutions", "16"], "")
    assert training.train_batch_size == [32] and training.detail_steps == []

    config = {"resolutions": [8, 16], "train_batch_size": 6, "learning_rate": "2e-3", "core_steps": 5, "seed": 3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    _, model, training = parse_arguments(["--config", str(tmp_path / "config.yaml"), "--core_steps", "9"], "")
    assert training.train_batch_size == [6, 6] and training.learning_rate == [2e-3, 2e-3]
    assert model.resolutions == [8, 16] and training.seed == 3 and training.core_steps == 9


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--streaming --num_high_res_pictures 5", "--num_high_res_pictures needs data that is not streamed"),
        ("--high_res_data_dir x", "--high_res_data_dir need --dataset_name or --train_data_dir"),
        ("--high_res_data_dir x --train_data_dir y --num_high_res_pictures 5", "and no --num_high_res_pictures"),
        ("--aspect_ratio_buckets 16x16", '--aspect_ratio_buckets 16x16: .* Write "64,64;48,80;80,48"'),
        ("--max_broken_share 1", "--max_broken_share 1.0: has to be from 0 to 0.99"),
        ("--shuffle_buffer_size 0", "--shuffle_buffer_size 0: has to be from 1"),
        ("--text_embeddings_dir x", "--text_embeddings_dir needs a text encoder that does not train"),
    ],
)
def test_data_that_cannot_be_had(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(flags.split(), "")
    assert re.search(message, capsys.readouterr().err)
