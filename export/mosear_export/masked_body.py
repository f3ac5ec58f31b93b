"""The functions of `masked` as text: what a call computes once, and what each layer does. Braces are filled in there."""

CALL = """
    zero = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    axis0 = Constant <value = int64[1] {{0}}> ()
    axis1 = Constant <value = int64[1] {{1}}> ()
    last_axis = Constant <value = int64[1] {{-1}}> ()
    around = Constant <value = int64[2] {{1, 2}}> ()
    one_value = Constant <value = int64[3] {{1, 2, 3}}> ()
    one_i32 = Constant <value = int32 {{1}}> ()
    zero_i32 = Constant <value = int32[1] {{0}}> ()
    floor = Constant <value = float {{{floor}}}> ()
    open_floor = Constant <value = float {{{floor} + 1.0}}> ()
    nothing = Constant <value = float {{0.0}}> ()
    never = Constant <value = float {{-1e30}}> ()

    key_shape = Shape(key_group)
    capacity = Gather(key_shape, one)
    slot_long = Range(zero, capacity, one)
    slot = Cast <to = 6> (slot_long)
    row_shape = Shape(query_position)
    rows = Gather(row_shape, one)
    row_long = Range(zero, rows, one)
    row = Cast <to = 6> (row_long)
    length = Unsqueeze(key_length, axis1)
    filled = Less(slot, length)
    filled_rows = Unsqueeze(filled, axis1)
    row_position = Unsqueeze(query_position, last_axis)
    reached = LessOrEqual(slot, row_position)
    seen = And(reached, filled_rows)
    finite_bias = Max(group_bias, floor)
    key_group_long = Cast <to = 7> (key_group)
    key_bias = GatherElements <axis = 1> (finite_bias, key_group_long)
    key_bias_rows = Unsqueeze(key_bias, axis1)
    mask_rows = Where(seen, key_bias_rows, floor)
    mask = Unsqueeze(mask_rows, axis1)

    last_position = Sub(length, one_i32)
    first_position = Gather <axis = 1> (query_position, zero_i32)
    last_unbound = Sub(last_position, first_position)
    rows_i32 = Cast <to = 6> (rows)
    highest = Sub(rows_i32, one_i32)
    last_row_high = Min(last_unbound, highest)
    last_row = Max(last_row_high, zero_i32)
    is_last_flat = Equal(row, last_row)
    is_last_row = Unsqueeze(is_last_flat, axis1)
    is_last = Unsqueeze(is_last_row, last_axis)
    last_long = Cast <to = 7> (last_row)
    last_index = Unsqueeze(last_long, around)

    is_open_key = Greater(key_bias, open_floor)
    is_open = And(is_open_key, filled)
    row_bias_flat = Where(filled, key_bias, floor)
    row_bias = Unsqueeze(row_bias_flat, around)
{groups}
    last_position_flat = Squeeze(last_position, axis1)
    is_later = GreaterOrEqual(last_position_flat, first_row)
    later = Cast <to = 1> (is_later)
    row_strength = Mul(later, strength)
    fewest = Min({count_video}, {count_audio})
    is_both = Greater(fewest, nothing)
    both = Cast <to = 1> (is_both)
    row_strength_column = Unsqueeze(row_strength, one_value)
    row_gate = Mul(row_strength_column, both)
"""
CALL_GROUP = """
    id_{g} = Constant <value = int32 {{{g}}}> ()
    is_member_{g} = Equal(key_group, id_{g})
    member_flat_{g} = Cast <to = 1> (is_member_{g})
    member_{g} = Unsqueeze(member_flat_{g}, around)
    is_open_{g} = And(is_member_{g}, is_open)
    row_mask_flat_{g} = Where(is_open_{g}, key_bias, never)
    row_mask_{g} = Unsqueeze(row_mask_flat_{g}, around)
    open_{g} = Cast <to = 1> (is_open_{g})
    count_flat_{g} = ReduceSum(open_{g}, axis1)
    count_{g} = Unsqueeze(count_flat_{g}, around)
"""

ATTENTION = """
    axis2 = Constant <value = int64[1] {{2}}> ()
    axis3 = Constant <value = int64[1] {{3}}> ()
    axis4 = Constant <value = int64[1] {{4}}> ()
    tiny = Constant <value = float {{1e-37}}> ()
    scale_factor = Constant <value_float: float = @scale> ()
    one_row = Constant <value = int64[4] {{1, {H}, 1, {D}}}> ()
    by_group = Constant <value = int64[5] {{0, {K}, {rep}, 1, {D}}}> ()
    by_head = Constant <value = int64[4] {{0, {H}, 1, -1}}> ()

    row_index = Expand(last_index, one_row)
    row = GatherElements <axis = 2> (query, row_index)
    grouped_row = Reshape(row, by_group)
    shared_key = Unsqueeze(key, axis2)
    products = Mul(grouped_row, shared_key)
    sums = ReduceSum <keepdims = 0> (products, axis4)
    scaled = Mul(sums, scale_factor)
    scores = Reshape(scaled, by_head)
{groups}
    top = Max({lses})
{masses}
    total = Sum({parts})
    log_total = Log(total)
    lse = Add(log_total, top)
{policy}
    mass_before = Concat <axis = 3> ({before})
    mass_after = Concat <axis = 3> ({after})
{bias}
    output = Attention <scale: float = @scale> (query, key, value, row_masks)
"""
GROUP = """
    masked_{g} = Add(scores, row_mask_{g})
    top_{g} = ReduceMax(masked_{g}, axis3)
    relative_{g} = Sub(masked_{g}, top_{g})
    e_{g} = Exp(relative_{g})
    sum_{g} = ReduceSum(e_{g}, axis3)
    log_sum_{g} = Log(sum_{g})
    lse_{g} = Add(log_sum_{g}, top_{g})
"""
MASS = """
    below_{g} = Sub(lse_{g}, top)
    part_{g} = Exp(below_{g})
"""
SHARE = "    before_{g} = Div(part_{g}, total)"

FLOW = """
    nothing = Constant <value = float {{0.0}}> ()
    unit = Constant <value = float {{1.0}}> ()
    pair = Add(before_{V}, before_{A})
{flow}
    moved = Mul(flow, row_gate)
    after_{V} = Add(before_{V}, moved)
    after_{A} = Sub(before_{A}, moved)
"""
BALANCE = """
{statistic}
    statistic_sum = Add(statistic_v, statistic_a)
    divisor = Max(statistic_sum, tiny)
    share_v = Div(statistic_v, divisor)
    share_a = Div(statistic_a, divisor)
    above_v = Sub(share_v, tau_v)
    above_a = Sub(share_a, tau_a)
    on_ramp_v = Div(above_v, ramp_v)
    on_ramp_a = Div(above_a, ramp_a)
    excess_v = Clip(on_ramp_v, nothing, unit)
    excess_a = Clip(on_ramp_a, nothing, unit)
    gives_v = Mul(excess_v, move_v)
    gives_a = Mul(excess_a, move_a)
    flow_v = Mul(before_{V}, gives_v)
    flow_a = Mul(before_{A}, gives_a)
    net = Sub(flow_a, flow_v)
    is_enough = GreaterOrEqual(pair, sigma)
    flow = Where(is_enough, net, nothing)
"""
SUM = """
    statistic_v = Identity(before_{V})
    statistic_a = Identity(before_{A})
"""
MEAN = """
    keys_v = Max(count_{V}, unit)
    keys_a = Max(count_{A}, unit)
    statistic_v = Div(before_{V}, keys_v)
    statistic_a = Div(before_{A}, keys_a)
"""
TARGET = """
    wanted = Mul(audio_share, pair)
    away = Sub(before_{A}, wanted)
    flow = Mul(away, move_a)
"""
BIAS = """
    most = Constant <value = float {{{most}}}> ()
    least = Constant <value = float {{-{most}}}> ()
{groups}
    key_bias = Add({bias})
    is_row = Identity(is_last)
    no_bias = Constant <value = float {{0.0}}> ()
    row_bias_here = Where(is_row, key_bias, no_bias)
    row_masks = Add(mask, row_bias_here)
"""
BIAS_GROUP = """
    log_before_{g} = Sub(lse_{g}, lse)
    safe_after_{g} = Max(after_{g}, tiny)
    log_after_{g} = Log(safe_after_{g})
    log_factor_{g} = Sub(log_after_{g}, log_before_{g})
    factor_{g} = Clip(log_factor_{g}, least, most)
    key_bias_{g} = Mul(factor_{g}, member_{g})
"""
