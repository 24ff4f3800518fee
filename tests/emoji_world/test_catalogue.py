"""Facts about the world that everything else relies on."""

from perfusion_jax.emoji_world import catalogue, make_examples


def test_the_world_is_as_large_as_promised():
    assert len(catalogue.CATEGORIES) >= 24
    assert len(catalogue.PLACES) >= 8
    kinds = (catalogue.CATEGORIES, catalogue.OTHERS, catalogue.PLACES, catalogue.COLOURS, catalogue.HEADWEAR)
    assert len({word for kind in kinds for word in kind}) == sum(map(len, kinds))


def test_held_out_vendors_never_enter_the_world():
    used = {
        vendor for category in (*catalogue.CATEGORIES, *catalogue.OTHERS) for vendor in catalogue.vendors_of(category)
    }
    assert used | {catalogue.HEADWEAR_VENDOR} <= set(catalogue.WORLD_VENDORS)
    assert not set(catalogue.WORLD_VENDORS) & set(catalogue.HELD_OUT_VENDORS)
    assert make_examples.VENDOR in catalogue.HELD_OUT_VENDORS
    assert set(catalogue.DRAWING_PACKAGES) == {*catalogue.WORLD_VENDORS, *catalogue.HELD_OUT_VENDORS}


def test_examples_are_categories_and_leave_contexts_unseen():
    assert {category for category, _ in make_examples.CONCEPTS.values()} <= set(catalogue.CATEGORIES)
    assert len(make_examples.CONCEPTS) >= 6
    unseen = make_examples.unseen_contexts()
    assert "on the beach" in unseen
    assert "on the grass" not in unseen
    assert len(unseen) >= 10
