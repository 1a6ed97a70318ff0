from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import SVC

from fmi_demo.data import FORM_STARTS, handwriting, split_digits
from fmi_demo.scenario import MAX_SITES, MIN_SITES


def test_the_parts_are_disjoint_and_together_are_the_whole_data_set():
    parts, late = split_digits(MAX_SITES, seed=7)
    rows = np.concatenate([part.rows for part in (*parts, late)])
    assert sorted(rows) == list(range(1797))
    assert len({part.site_id for part in (*parts, late)}) == MAX_SITES + 1


def test_fewer_sites_share_no_row_with_each_other_or_the_late_site():
    parts, late = split_digits(MIN_SITES, seed=3)
    rows = np.concatenate([part.rows for part in (*parts, late)])
    assert len(parts) == MIN_SITES
    assert len(set(rows)) == len(rows)


def test_a_part_has_the_images_and_labels_of_its_rows():
    images, labels = load_digits(return_X_y=True)
    parts, _ = split_digits(MAX_SITES, seed=7)
    for part in parts:
        np.testing.assert_array_equal(part.images * 16, images[part.rows])
        np.testing.assert_array_equal(part.labels, labels[part.rows])


def test_each_form_begins_with_the_ten_digits_in_order():
    _, labels = load_digits(return_X_y=True)
    for start in FORM_STARTS:
        assert list(labels[start : start + 10]) == list(range(10))


def test_the_parts_are_not_identically_distributed():
    # If they were, nothing could tell which site an image is from: 1 in 14 right.
    parts, late = split_digits(MAX_SITES, seed=7)
    everyone = [*parts, late]
    images = np.concatenate([part.images for part in everyone])
    owner = np.repeat(range(len(everyone)), [len(part.rows) for part in everyone])
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    right = cross_val_score(SVC(C=10), images, owner, cv=folds).mean()
    assert right > 0.5


def test_the_seed_decides_who_has_which_writer():
    def forms(seed: int) -> list[int]:
        parts, late = split_digits(MAX_SITES, seed=seed)
        return [part.form for part in (*parts, late)]

    assert forms(1) == forms(1)
    assert forms(1) != forms(2)


@pytest.mark.parametrize("sites", [MIN_SITES - 1, MAX_SITES + 1])
def test_a_number_of_sites_out_of_range_is_refused(sites):
    with pytest.raises(ValueError, match="sites must be"):
        split_digits(sites, seed=7)


def test_handwriting_describes_a_drawn_stroke():
    image = np.zeros((8, 8))
    image[0, 7] = image[7, 0] = 1.0  # a slash: up by 7 and to the right by 7
    found = handwriting(image.reshape(1, 64))
    assert found == pytest.approx({"ink": 2 / 64, "width": 3.5, "height": 3.5, "slant": 1.0})
