"""The faults that `mutations` plants: each one a mistake that a maintainer could make, as an exact replacement of text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One wrong value.

    Attributes:
        name: what is wrong, for the report and for ``--only``.
        file: where, from the root.
        old: the right text, which is there exactly once.
        new: the wrong text.
        tests: test files, or ``file::test``, that are most likely to notice; tried first.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


# file -> name -> (right text, wrong text, tests separated by spaces)
Table = dict[str, dict[str, tuple[str, str, str]]]
TABLE: Table = {
    "superlora_tn/model/tuned.py": {
        "disabled-stays-unmerged": (
            "if was_merged and not self.merged:\n                self.merge()",
            "if was_merged and not self.merged:\n                pass",
            "test_merge_detach.py::test_disabled_is_the_base_bit_for_bit_also_while_merged",
        ),
        "disabled-switches-all-on": (
            "self._disabled -= 1",
            "self._disabled = 0",
            "test_merge_detach.py::test_disabled_nests_and_survives_errors",
        ),
        "merge-adds-twice": (
            "weight.add(self._members[name], delta)",
            "weight.add(self._members[name], 2 * delta)",
            "test_merge_detach.py::test_merged_equals_attached_equals_dense",
        ),
        "leaving-broken-off": (
            "finish(lambda: self._go(model, name, keep))",
            "self._go(model, name, keep)",
            "test_handles.py::test_an_interrupt_at_any_call_finds_it_done_or_not_begun",
        ),
        "replacing-broken-off": (
            "finish(write)",
            "write()",
            "test_handles.py::test_an_interrupt_at_any_call_finds_it_done_or_not_begun",
        ),
    },
    "superlora_tn/model/buffers.py": {
        "sparse-buffers-are-compared": (
            " and buffer.layout is torch.strided",
            "",
            "test_attach.py::test_sparse_buffers_of_the_base_stay_as_they_are",
        ),
        "left-anew-when-done-again": (
            "self._left = self._left or {",
            "self._left = {",
            "test_handles.py::test_an_interrupt_at_any_call_finds_it_done_or_not_begun",
        ),
        "copies-below-forgotten": (
            "above.copy = kept.copy",
            "above.copy = above.copy",
            "test_beside.py::test_running_means_are_the_bases_again_when_the_last_adapter_leaves",
        ),
        "kept-buffers-of-another-adapter": (
            "self.put({name: self._kept[name].copy for name in self._changed() if name not in values})",
            "self.put({})",
            "test_beside.py::test_replace_leaves_nothing_of_the_adapter_before",
        ),
        "stand-in-written-in-place": (
            "shown = nn.Parameter(copy, requires_grad=False) if self.trains else copy.clone()",
            "shown = copy if self.trains else copy.clone()",
            "test_beside.py",
        ),
    },
    "superlora_tn/model/frozen.py": {
        "inference-tensors-are-set-outside": (
            "parameter.is_inference() or torch",
            "torch",
            "test_attach.py::test_a_base_that_was_made_in_inference_mode_serves_and_is_given_back",
        ),
        "second-adapter-freezes-what-trains": (
            '_train(parameter, bool(record["trains"]))',
            "_train(parameter, False)",
            "test_beside.py::test_another_adapter_freezes_nothing_that_trains_beside_the_first",
        ),
        "detach-leaves-frozen": (
            '_train(parameter, record["wanted"])',
            "_train(parameter, False)",
            "test_merge_detach.py::test_detach_restores_requires_grad",
        ),
    },
    "superlora_tn/model/weights.py": {
        "base-kept-while-half-merged": (
            "staying, self.merged = [m for m in self.merged if m in deltas], []",
            "staying, self.merged = [m for m in self.merged if m in deltas], list(self.merged)",
            "test_handles.py",
        ),
        "unmerge-subtracts": (
            "self.kind.put(self.layer, self.base)",
            "self.kind.put(self.layer, self.base * (1 + 1e-7))",
            "test_merge_detach.py::test_unmerge_and_detach_give_the_base_back_byte_for_byte",
        ),
    },
    "superlora_tn/update/joined.py": {
        "merge-rounds-twice": (
            "return weight.to(wide) + network",
            "return weight + network.to(weight.dtype)",
            "test_layers.py::test_adding_to_a_weight_rounds_once",
        ),
        "detached-norm-has-a-gradient": (
            "return not join.detached",
            "return True",
            "test_joins.py::test_norms_without_dw_are_those_of_w_plus_dw",
        ),
        "left-is-right": (
            'network @ weight if join.side == "left" else weight @ network',
            'network @ weight if join.side == "left" else weight @ network.T',
            "test_joins.py::test_outputs_merged_weights_and_read_weights_follow_the_formula",
        ),
        "norms-of-an-older-weight": (
            '"norms"), owners, make)',
            '"norms"), [], make)',
            "test_joins.py::test_norms_of_w_are_found_again_when_w_changes",
        ),
    },
    "superlora_tn/model/recognise.py": {
        "torchscript-is-adapted": (
            "if is_closed(layer):\n        return False",
            "if is_closed(layer):\n        pass",
            "test_attach.py::test_the_layers_beside_a_torchscript_program_are_adapted_and_its_own_are_refused",
        ),
        "kept-output-overwritten": (
            "if len(hooks) > 1 and next(iter(hooks.values())) is not hook:\n        return None",
            "if False:\n        return None",
            "test_layers.py::test_an_output_that_a_users_hook_kept_is_not_overwritten",
        ),
        "weight-that-trains-gets-no-gradient": (
            "type(weight) is nn.Parameter and not weight.requires_grad",
            "type(weight) is nn.Parameter",
            "test_holes.py::test_a_weight_that_trains_gets_its_gradient_without_a_bias",
        ),
    },
    "superlora_tn/update/passes.py": {
        "pass-of-another-thread": (
            "class _Stack(threading.local):",
            "class _Stack:",
            "test_passes.py",
        ),
        "interrupted-pass-goes-on": (
            "return self.frame is None",
            "return True",
            "test_passes.py",
        ),
        "shared-over-grad-modes": (
            "key = (who, _mode())",
            "key = (who, None)",
            "test_passes.py",
        ),
        "kept-tensors-of-older-parameters": (
            "if held is None or held[0][0] != now:",
            "if held is None:",
            "test_passes.py test_sharing.py::test_parameters_changed_between_passes_are_seen",
        ),
    },
    "superlora_tn/update/regions.py": {
        "strength-of-backward": (
            "return notes.read.get(key, now)",
            "return now",
            "test_several.py::test_what_is_computed_again_has_the_strength_of_its_call",
        ),
    },
    "superlora_tn/update/physical.py": {
        "scale-dropped-on-apply": (
            "stage.rest(cast_x, *nodes, out=out, alpha=self.scale, base=base)",
            "stage.rest(cast_x, *nodes, out=out, base=base)",
            "test_routes_agree.py::test_apply_delta_and_the_chosen_route_agree",
        ),
        "scale-dropped-on-delta": (
            "self._build(*self._nodes(member, self.tensors()), alpha=self.scale)",
            "self._build(*self._nodes(member, self.tensors()))",
            "test_equals_dense.py::test_every_variants_delta_equals_the_oracle",
        ),
        "scale-dropped-on-halves": (
            "zip(self._half_runs, (self.scale, 1.0), strict=True)",
            "zip(self._half_runs, (1.0, 1.0), strict=True)",
            "test_halves.py::test_halves_multiply_to_the_oracles_dw",
        ),
        "scale-dropped-behind-a-shared-x": (
            "stage.rest(carried.value, *rest, out=out, alpha=self.scale",
            "stage.rest(carried.value, *rest, out=out",
            "test_sharing.py::test_outputs_and_gradients_are_the_oracles_also_accumulated",
        ),
        "shared-x-overwritten": (
            "state([x, *own])",
            "state(own)",
            "test_sharing.py::test_an_x_changed_in_place_between_two_calls_is_seen",
        ),
        "shared-x-through-older-parameters": (
            "state([x, *own])",
            "state([x])",
            "test_holes.py::test_an_x_shared_by_two_calls_never_goes_through_older_factors",
        ),
        "start-by-out": (
            "return self.group.shape[1]",
            "return self.group.shape[0]",
            "test_holes.py::test_the_first_values_variances_multiply_to_loras",
        ),
        "dropout-in-the-base-gradient": (
            "cast_x, base = self.drop(cast_x, training), None",
            "cast_x = self.drop(cast_x, training)",
            "test_holes.py::test_dropout_drops_nothing_of_the_bases_gradient",
        ),
        "plan-of-fewer-tokens-at-the-border": (
            "if tokens >= least:",
            "if tokens > least:",
            "test_holes.py::test_a_call_takes_the_plan_of_the_largest_number_of_tokens_not_above_its_own",
        ),
    },
    "superlora_tn/update/flat.py": {
        "scale-inside-tanh": (
            "self.map(wide[:, :inner], scale, nodes[0].dtype)",
            "self.map(wide[:, :inner] * scale, 1.0, nodes[0].dtype)",
            "test_holes.py::test_the_scale_stands_behind_the_nonlinear_map",
        ),
        "flat-weight-in-fortran-order": (
            "torch.cat(pieces)).reshape(member.shape)",
            "torch.cat(pieces)).reshape(member.shape[::-1]).T",
            "test_equals_dense.py::test_every_variants_delta_equals_the_oracle",
        ),
        "shared-weight-in-fortran-order": (
            "{name: piece.reshape(self.members[name].shape) for",
            "{name: piece.reshape(self.members[name].shape[::-1]).T for",
            "test_merge_detach.py::test_merged_equals_attached_equals_dense",
        ),
        "groups-counted-from-zero": (
            "slice(first, last), *rows[1:]",
            "slice(0, groups), *rows[1:]",
            "test_holes.py::test_a_weight_of_several_whole_groups_begins_with_its_own",
        ),
        "slice-counted-from-the-group": (
            "run, begin - low * row)",
            "run, begin)",
            "test_equals_dense.py::test_every_variants_delta_equals_the_oracle",
        ),
        "surplus-cut-in-front-of-the-map": (
            "self.map(wide[:, :inner]",
            "self.map(wide[:, -inner:]",
            "test_equals_dense.py::test_every_variants_delta_equals_the_oracle",
        ),
        "surplus-cut-in-front-of-the-group": (
            "return rows[:, :length]",
            "return rows[:, -length:]",
            "test_holes.py::test_a_pass_of_the_model_cuts_the_surplus_behind_each_group",
        ),
        "recomputed-gradient-of-x-without-the-base": (
            "if through is not None and ctx.fused:",
            "if False:",
            "test_recompute.py::test_outputs_and_gradients_are_those_of_a_kept_dw",
        ),
    },
    "superlora_tn/contraction/cut.py": {
        "widest-cut-taken": (
            "bond, inner = min(cuts)",
            "bond, inner = max(cuts)",
            "test_halves.py::test_the_thinnest_cut_is_found",
        ),
        "halves-always-taken": (
            "return 2 * self.cost(shape, rows, blocks) < d_out * d_in * (rows + self.bond)",
            "return True",
            "test_halves.py::test_dw_is_built_where_halves_do_not_pay",
        ),
    },
    "backends/superlora_tn_backends/writer.py": {
        "scale-dropped-in-gradient-of-large": (
            'f"({small} if alpha == 1.0 else {small} * alpha)" if alpha and not late else small',
            "small",
            "test_gradients.py::test_gradients_of_every_variant_equal_the_oracles",
        ),
        "scale-dropped-in-gradient-of-small": (
            'f"{text} if alpha == 1.0 else ({text}).mul_(alpha)" if alpha else text',
            "text",
            "test_gradients.py::test_gradients_of_every_variant_equal_the_oracles",
        ),
        "scale-dropped-without-gradients": (
            "torch.addmm({out}, {left}, {right}, alpha=alpha), out.shape",
            "torch.addmm({out}, {left}, {right}), out.shape",
            "test_holes.py::test_a_layer_carries_the_scale_with_and_without_gradients",
        ),
        "gradient-of-a-hyperindex-averaged": (
            'f"TL.sum({text}, {lacking})" if lacking',
            'f"torch.mean({text}, {lacking})" if lacking',
            "test_gradients.py::test_gradients_of_every_variant_equal_the_oracles",
        ),
        "gradient-of-a-batch-averaged": (
            'f"TL.sum(TL.matmul({result}, {large}.mT), {first})"',
            'f"torch.mean(TL.matmul({result}, {large}.mT), {first})"',
            "test_routes_agree.py::test_apply_delta_and_the_chosen_route_agree",
        ),
    },
    "backends/superlora_tn_backends/tensorly_torch.py": {
        "x-comes-back-without-the-scale": (
            "whole = torch.add(base, tensors[1], alpha=ctx.alpha)",
            "whole = torch.add(base, tensors[1])",
            "test_node_maps.py::test_x_comes_back_through_w_and_a_matrix_at_once",
        ),
        "complex-through-the-fused-lines": (
            "return is_eager() and COMPLEX.isdisjoint([t.dtype for t in tensors])",
            "return is_eager()",
            "test_complex.py::test_every_variant_is_the_oracles_in_both_directions",
        ),
        "scale-dropped-in-second-derivatives": (
            "program.run(*views, alpha=alpha)",
            "program.run(*views)",
            "test_holes.py::test_second_derivatives_carry_the_scale",
        ),
        "gradient-of-x-without-the-base": (
            "_add_product(grads[0], grad, base)",
            "grads[0]",
            "test_attach.py::test_gradient_reaches_the_input",
        ),
    },
    "backends/superlora_tn_backends/products.py": {
        "weights-of-a-sum-dropped": (
            "total.addcmul_(part, factor)",
            "total.add_(part)",
            "test_products.py::test_weighted_sums_are_the_oracles",
        ),
        "onednn-for-double-precision": (
            "or a.dtype is not torch.float32",
            "",
            "test_products.py::test_others_stay_with_torch",
        ),
    },
    "backends/superlora_tn_backends/numpy_reference.py": {
        "scale-dropped-by-numpy": (
            "result = alpha * result.reshape(flat)",
            "result = result.reshape(flat)",
            "test_backends.py::test_all_members_at_once_equal_the_oracle",
        ),
    },
    "superlora_tn/network/spec.py": {
        "rslora-scales-by-rank": (
            "math.sqrt(rank) if self.rslora else rank",
            "rank",
            "test_spec_json.py::test_the_scale_is_alpha_over_rank_or_over_its_root",
        ),
    },
    "superlora_tn/declare/parts.py": {
        "scale-by-the-smallest-rank": (
            "return max(part.rank) if isinstance(part.rank, tuple)",
            "return min(part.rank) if isinstance(part.rank, tuple)",
            "test_holes.py::test_alpha_is_divided_by_the_largest_rank",
        ),
    },
    "superlora_tn/update/summed.py": {
        "surplus-cut-in-front": (
            "found.narrow(k - len(self.own), 0, size)",
            "found.narrow(k - len(self.own), -size, size)",
            "test_sums.py::test_dw_and_both_routes_are_the_oracles",
        ),
        "only-the-first-term": (
            "            if own.adapter not in self._thin:\n",
            "            if own.adapter not in self._thin and own is each[0]:\n",
            "test_summed.py::test_values_and_gradients_are_those_of_the_dense_sum",
        ),
        "the-weight-forgotten": (
            "self.spec.scale * strength * self._term.weight",
            "self.spec.scale * strength",
            "test_summed.py::test_values_and_gradients_are_those_of_the_dense_sum",
        ),
    },
    "superlora_tn/network/terms.py": {
        "shared-factor-left-out": (
            "[*fixed, *(number",
            "[*(number",
            "test_summed.py::test_products_of_sums_are_multiplied_out",
        ),
        "a-shared-factor-taken-for-zero": (
            "[d for d in able if d.name not in taken] or able",
            "able",
            "test_summed.py::test_terms_choose_their_zero_around_the_declared_ones",
        ),
    },
    "superlora_tn/network/axes.py": {
        "kronecker-swapped": (
            "self.stride * math.prod(sizes[k + 1 :])",
            "self.stride * math.prod(sizes[:k])",
            "test_equals_dense.py::test_a_named_variant_is_its_papers_formula",
        ),
        "sides-too-small": (
            "size = -(-size // sides[-1])",
            "size = size // sides[-1]",
            "test_sums.py::test_dw_and_both_routes_are_the_oracles",
        ),
    },
    "superlora_tn/network/expand.py": {
        "the-least-side-for-the-first": (
            "key=lambda i: (i, -1) not in part.sizes)",
            "key=lambda i: False)",
            "test_sums.py::test_sizes_may_wait_for_the_weight",
        ),
        "tucker-core-transposed": (
            "tuple(bonds.get(a, a) for a in axes), zero=True",
            "tuple(bonds.get(a, a) for a in axes[::-1]), zero=True",
            "test_equals_dense.py::test_every_variants_delta_equals_the_oracle",
        ),
        "tucker-ranks-by-position": (
            "rank[wanted.index(a.root)] for a in factored",
            "rank[k] for k, a in enumerate(factored)",
            "test_equals_dense.py::test_tucker_gives_each_rank_to_the_factor_named_beside_it",
        ),
        "dense-if-large-border": (
            "part.rank >= max(a.size",
            "part.rank > max(a.size",
            "test_holes.py::test_a_split_at_half_its_longer_side_is_dense",
        ),
        "loha-first-product-at-zero": (
            "last = k == len(part.parts) - 1  # LoHa",
            "last = k == 0  # LoHa",
            "test_zero_at_start.py::test_a_variant_starts_at_zero_where_its_paper_or_peft_does",
        ),
        "factor-of-in-at-zero": (
            'a for a in axes if a.root == "out"',
            'a for a in axes if a.root == "in"',
            "test_zero_at_start.py::test_a_variant_starts_at_zero_where_its_paper_or_peft_does",
        ),
    },
    "superlora_tn/network/graph.py": {
        "heads-split-fastest": (
            "tuple(i for mode, indices in self.modes if mode.role == role for i in indices)",
            'tuple(i for m, ids in sorted(self.modes, key=lambda m: m[0].name == "head") if m.role == role for i in ids)',
            "test_equals_dense.py::test_every_variants_delta_equals_the_oracle",
        ),
    },
    "superlora_tn/update/eager.py": {
        "tangents-through-the-fused-lines": (
            " or forward_ad._current_level >= 0",
            "",
            "test_forward_mode.py::test_a_tangent_of_x_alone_passes_while_the_parameters_train",
        ),
        "tracing-through-the-fused-lines": (
            " or _is_tracing() or forward_ad",
            " or forward_ad",
            "test_compile.py::test_a_traced_model_is_saved_and_loaded_for_any_batch",
        ),
    },
    "superlora_tn/update/initialise.py": {
        "first-values-of-the-default-dtype": (
            'torch.empty(shape, dtype=torch.float32, device="cpu")',
            'torch.empty(shape, device="cpu")',
            "test_zero_at_start.py::test_no_default_of_torchs_changes_the_first_values",
        ),
        "start-nearly-zero": (
            "return values.zero_()",
            "return values.fill_(1e-8)",
            "test_zero_at_start.py::test_every_variant_starts_at_zero",
        ),
        "start-too-wide": (
            "(1 / (3 * fan_in))",
            "(1 / fan_in)",
            "test_holes.py::test_the_first_values_variances_multiply_to_loras",
        ),
    },
    "superlora_tn/contraction/plan.py": {
        "flat-modes-reversed": (
            'axes = (graph.open("flat"),)',
            'axes = (graph.open("flat")[::-1],)',
            "test_equals_dense.py::test_every_variants_delta_equals_the_oracle",
        ),
        "route-inverted": (
            "self.delta_price < self.apply.price",
            "self.delta_price > self.apply.price",
            "test_plan.py::test_the_cheaper_route_is_chosen_and_the_other_refused_with_its_price",
        ),
        "delta-priced-without-backward": (
            "self.delta.price + 3 * product",
            "self.delta.price + product",
            "test_holes.py::test_a_price_counts_the_products_of_forward_and_backward",
        ),
    },
    "superlora_tn/declare/fold.py": {
        "group-border-off-by-one": (
            "min(group, self.total % self.groups)",
            "min(group, self.total % self.groups + 1)",
            "test_folds.py::test_a_flat_fold_covers_each_element_once_in_order",
        ),
        "inner-size-in-floats": (
            "math.ceil(Fraction(str(ratio)) * offset / groups)",
            "math.ceil(ratio * offset / groups)",
            "test_folds.py::test_a_ratio_is_counted_in_fractions_not_floats",
        ),
        "inner-size-of-the-rounded-length": (
            "Fraction(str(ratio)) * offset / groups",
            "Fraction(str(ratio)) * length",
            "test_holes.py::test_a_ratio_is_of_the_mean_group_not_of_the_longest",
        ),
        "stacked-to-the-narrowest": (
            "self._sides(inner, max(",
            "self._sides(inner, min(",
            "test_folds.py::test_stacked_is_as_wide_as_the_widest_weight",
        ),
        "last-component-is-a-layer": (
            "enumerate(words[:-1])",
            "enumerate(words)",
            "test_folds.py::test_a_name_splits_behind_its_last_layer_number",
        ),
        "member-off-by-one": (
            "places[n][words[n][k]] for n",
            "places[n][words[n][k]] - 1 for n",
            "test_equals_dense.py::test_every_variants_delta_equals_the_oracle",
        ),
    },
    "superlora_tn/update/fixed_maps.py": {
        "signs-of-the-wrong-stream": (
            '("signs", "flips"',
            '("gaussians", "flips"',
            "test_projections.py::test_a_mapped_vector_of_a_seed_is_this_for_ever",
        ),
        "permutation-of-the-wrong-stream": (
            '("permutation", "order"',
            '("signs", "order"',
            "test_projections.py::test_a_mapped_vector_of_a_seed_is_this_for_ever",
        ),
        "tables-of-the-wrong-seed": (
            "Table(factor, declared.seed, ",
            "Table(factor, declared.seed + 1, ",
            "test_projections.py::test_a_mapped_vector_of_a_seed_is_this_for_ever",
        ),
        "fastfood-not-normalised": (
            "1.0 / math.sqrt(self.size_in *",
            "1.0 / math.sqrt(self.padded *",
            "test_projections.py::test_a_map_is_its_explicit_matrix",
        ),
        "tanh-dropped": (
            "return torch.tanh(y) if self.declared.tanh else y",
            "return y",
            "test_projections.py::test_tanh_follows_the_linear_map",
        ),
        "shuffle-inverted": (
            'return x.index_select(-1, self.table("order", x))',
            'return x.index_select(-1, self.table("order", x).argsort())',
            "test_projections.py::test_a_map_is_its_explicit_matrix",
        ),
        "map-in-half-precision": (
            "self.carry(x.to(widened(x.dtype)))",
            "self.carry(x)",
            "test_map_numbers.py::test_a_long_vector_neither_overflows_nor_vanishes",
        ),
        "tables-cast-with-the-model": (
            "            found = fn(torch.ones(1, device=table.device))\n",
            "            found = self._buffers[name] = fn(table)\n",
            "test_map_numbers.py::test_no_cast_of_the_module_touches_the_tables",
        ),
    },
    "superlora_tn/update/walsh.py": {
        "transform-inverted-in-backward": (
            "return transform(gradient, *ctx.settings), None, None",
            "return transform(gradient, *ctx.settings) / gradient.shape[-1], None, None",
            "test_projections.py::test_the_transform_in_runs_differentiates_twice_and_maps",
        ),
        "matrix-of-a-mode-kept": (
            "if is_eager() and not torch._C._len_torch_dispatch_stack():",
            "if is_eager():",
            "test_map_numbers.py::test_a_map_is_right_in_every_mode_and_after_it",
        ),
        "matrix-made-in-inference-mode": (
            "with torch.inference_mode(False), torch.no_grad():",
            "with torch.no_grad():",
            "test_map_numbers.py::test_a_map_is_right_in_every_mode_and_after_it",
        ),
    },
    "superlora_tn/model/convolutions.py": {
        "kernel-before-in": (
            "kernel = inner.reshape(inner.shape[0], -1, *layer.kernel_size).to(y.dtype)",
            "kernel = inner.reshape(inner.shape[0], *layer.kernel_size, -1).movedim(-1, 1).to(y.dtype)",
            "test_layers.py::test_convolutions",
        ),
    },
    "superlora_tn/model/states.py": {
        "nodes-in-a-merged-state-dict": (
            "if not self.merged:\n            return super().state_dict",
            "if True:\n            return super().state_dict",
            "test_handles.py",
        ),
        "copies-hold-nothing": (
            "hold_on(self._frozen, self._holder, self._base.also)",
            "pass",
            "test_handles.py::test_a_copy_holds_what_it_froze",
        ),
    },
    "superlora_tn/model/kinds.py": {
        "written-where-it-is-shown": (
            "shown = isinstance(layer, Shows)",
            "shown = False",
            "test_several.py::test_an_adapter_at_the_output_merges_beside_one_at_the_weight",
        ),
        "conv1d-written-untransposed": (
            "stored(layer).copy_(matrix.t())",
            "stored(layer).copy_(matrix.reshape(layer.weight.shape))",
            "test_layers.py::test_gpt2s_conv1d",
        ),
    },
    "superlora_tn/model/site.py": {
        "merged-weight-adapted-again": (
            "            self.ran = self.ran or eager\n            return output",
            "            self.ran = self.ran or eager",
            "test_merge_detach.py::test_merged_equals_attached_equals_dense",
        ),
    },
    "superlora_tn/model/targets.py": {
        "unmatched-target-skipped": (
            "if not own:",
            "if not own and len(targets) == 1:",
            "test_attach.py::test_what_does_not_fit_raises_and_changes_nothing",
        ),
    },
    "superlora_tn/files/tensors.py": {
        "extra-tensor-ignored": (
            "if foreign := found - wanted:",
            "if (foreign := found - wanted) and len(found) < len(wanted):",
            "test_checkpoint.py::test_an_unexpected_tensor_raises",
        ),
        "wrong-shape-loads": (
            'if entry["shape"] != list(shape):',
            'if len(entry["shape"]) != len(shape):',
            "test_checkpoint.py::test_a_wrong_shape_raises",
        ),
        "wrong-dtype-loads": (
            "known = floats if name in nodes else stored",
            "known = stored",
            "test_checkpoint.py::test_tensors_that_are_no_floats_raise",
        ),
    },
    "superlora_tn/files/own.py": {
        "hash-not-checked": (
            "if hashlib.sha256(data).hexdigest() == record.sha256:",
            "if data:",
            "test_checkpoint.py::test_tensors_of_another_save_raise",
        ),
        "reader-gives-up-at-once": (
            "if still == STILL:",
            "if still == 0:",
            "test_checkpoint_atomic.py::test_a_reader_that_is_overtaken_reads_the_new_adapter",
        ),
    },
    "superlora_tn/files/record.py": {
        "digest-not-checked": (
            'if body["digest"] != digest(body):',
            'if not body["digest"]:',
            "test_checkpoint.py::test_an_edited_json_raises",
        ),
    },
    "superlora_tn/files/folder.py": {
        "savers-take-no-turns": (
            "locked = _lock(handle, place)",
            "locked = True",
            "test_checkpoint_atomic.py::test_a_saver_waits_while_another_commits",
        ),
        "a-pipe-is-read": (
            "if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):",
            "if not os.fstat(file.fileno()).st_mode:",
            "test_checkpoint_hostile.py::test_a_reader_takes_no_pipe_and_no_device",
        ),
        "draft-left-behind": (
            "            yield draft\n    finally:\n        _remove([path])",
            "            yield draft\n        _remove([path])\n    finally:\n        pass",
            "test_checkpoint_interrupted.py::test_an_interruption_at_any_call_leaves_one_adapter_and_nothing_else",
        ),
    },
    "superlora_tn/files/gguf.py": {
        "gguf-rows-stay-in-its-order": (
            "_turned(up, (count, up.shape[0] // count // 2, 2))",
            "_turned(up, (count, 2, up.shape[0] // count // 2))",
            "test_gguf_names.py::test_rows_of_heads_are_what_llama_cpp_makes_of_them",
        ),
        "gguf-keys-counted-as-queries": (
            'count = heads[name.endswith("k_proj")]',
            "count = heads[0]",
            "test_gguf_names.py::test_rows_of_heads_are_what_llama_cpp_makes_of_them",
        ),
    },
    "superlora_tn/files/bounds.py": {
        "a-name-twice-is-read": (
            "if len(found) != len(pairs):",
            "if len(found) > len(pairs):",
            "test_checkpoint_hostile.py::test_json_that_no_adapter_has_raises",
        ),
    },
    "superlora_tn/contraction/profile.py": {
        "plan-cached-without-the-device": (
            "    width: int = 1\n",
            "    width: int = 1\n    __eq__ = lambda one, other: isinstance(other, Device)\n    __hash__ = lambda one: 0\n",
            "test_holes.py::test_a_plan_is_priced_for_its_own_device",
        ),
    },
    "superlora_tn/contraction/layout.py": {
        "step-priced-without-backward": (
            "self.items * device.item + device.latency) * self.products",
            "self.items * device.item + device.latency)",
            "test_holes.py::test_a_price_counts_the_products_of_forward_and_backward",
        ),
    },
    "superlora_tn/network/budget.py": {
        "budget-may-not-be-spent-whole": (
            "self._last(low, lambda p: p[0] <= budget)",
            "self._last(low, lambda p: p[0] < budget)",
            "test_holes.py::test_a_budget_may_be_spent_whole",
        ),
    },
    "superlora_tn/tools/geometry.py": {
        "similarity-over-the-directions-found": (
            "float((a.T @ b).square().sum()) / k",
            "float((a.T @ b).square().sum()) / max(a.shape[1], 1)",
            "test_geometry.py::test_missing_directions_share_nothing",
        ),
    },
    "backends/superlora_tn_backends/tenalg.py": {
        "ellipsis-from-the-left": (
            "range(covered, 0, -1)",
            "range(covered)",
            "test_tenalg.py::test_each_form_is_planned_and_equals_torch",
        ),
        "diagonal-in-front": (
            "left = [*(i for k, i in enumerate(left) if k not in pairs[-1]), repeated[0]]",
            "left = [repeated[0], *(i for k, i in enumerate(left) if k not in pairs[-1])]",
            "test_tenalg.py::test_each_form_is_planned_and_equals_torch",
        ),
    },
    "superlora_tn/network/applied.py": {
        "blocks-share-a-phase": (
            'self._new(f"{node.name}_phase{k}", 2)',
            'self._new(f"{node.name}_phase{k}", 2)[:0]',
            "test_node_maps.py::test_x_meets_the_node_on_both_routes",
        ),
    },
    "superlora_tn/update/node_maps.py": {
        "maps-at-each-call": (
            "return make() if made is None else cast(list[Tensor], made)",
            "return make()",
            "test_node_maps.py::test_what_is_stored_is_mapped_once_a_pass",
        ),
        "wavelets-turned": (
            "(mean, down), (along, both) = top.chunk(2, -1), bottom.chunk(2, -1)",
            "(mean, along), (down, both) = top.chunk(2, -1), bottom.chunk(2, -1)",
            "test_mapped_variants.py::test_waveft_is_pefts",
        ),
        "spread-without-its-lengths": (
            "(stored * often.rsqrt())[places]",
            "stored[places]",
            "test_mapped_variants.py::test_uni_lora_is_pefts_times_g",
        ),
    },
    "superlora_tn/verification/cases.py": {
        "verify-takes-a-million-bounds": (
            "np.where(error > 0, error / allowed, 0.0)",
            "np.where(error > 0, error / (1e6 * allowed), 0.0)",
            "test_holes.py::test_verify_notices_an_error_of_a_billionth",
        ),
        "verify-takes-nan-for-no-error": (
            "if not np.isfinite(error).all():\n        return math.inf",
            "if not np.isfinite(error).all():\n        return 0.0",
            "test_holes.py::test_verify_takes_no_number_that_is_none",
        ),
    },
    "superlora_tn/model/places.py": {
        "what-computes-a-weight-is-a-layers-name": (
            "if name and not isinstance(module, Adapter) and not computes:",
            "if name and not isinstance(module, Adapter):",
            "test_attach.py::test_a_layer_whose_weight_is_computed_is_meant_by_its_number",
        ),
    },
    "superlora_tn/model/attach.py": {
        "what-has-no-shape-is-frozen": (
            "    check_shaped(model)\n",
            "",
            "test_attach.py::test_a_model_with_a_part_that_has_no_shape_yet_is_left_as_it_was",
        ),
    },
    "superlora_tn/model/joins.py": {
        "a-join-reads-what-is-no-weight": (
            "if not isinstance(weight, Tensor):",
            "if weight is None:",
            "test_quantised.py::test_a_join_says_what_to_do_where_another_layer_took_its_hooks_over",
        ),
    },
}
FAULTS = tuple(
    Fault(name, file, old, new, tuple(f"tests/{test}" for test in tests.split()))
    for file, faults in TABLE.items()
    for name, (old, new, tests) in faults.items()
)
