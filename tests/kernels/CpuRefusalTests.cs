namespace Rollout.Kernels.Tests;

/// <summary>An inconsistent step is refused before it touches memory, at every border, and also when it is repeated.</summary>
public sealed class CpuRefusalTests : IDisposable
{
    private const int Vocabulary = 40, HeadDim = 16, Blocks = 4;

    private readonly CpuBackend _backend = new(1);
    private readonly Bench _bench;
    private readonly KvCache _cache;
    private readonly RopeTable _rope;

    public CpuRefusalTests()
    {
        _bench = new Bench(_backend);
        _cache = _bench.Cache(2, Blocks, 1, HeadDim);
        _rope = _bench.Rope(HeadDim, 20);
    }

    public void Dispose() => _backend.Dispose();

    [Fact]
    public void A_layout_that_contradicts_itself_is_refused_and_no_step_has_begun()
    {
        Begins(_ => { });
        Refused("-1 sequences", step => step.SequenceCount = -1);
        Refused("3 sequences", step => step.SequenceCount = 3);
        Refused("first row 1", step => step.RowStart[0] = 1);
        Refused("Sequence 1 has rows 3 to 2", step => step.RowStart[2] = 2);
        Refused("Sequence 1 has rows 3 to 6", step => step.RowStart[2] = 6);
        Refused("Row 1 has position 0", step => step.Positions[1] = 0);
        Refused("Row 2 has position 1", step => step.Positions[2] = 1);
        Refused("Row 0 has position -1", step => step.Positions[0] = -1);
        Refused("Row 4 has position 32", step => step.Positions[4] = 32);
        Begins(step => step.Positions[4] = 31);
        Begins(step => (step.Positions[0], step.Positions[1], step.Positions[2]) = (0, 30, 31));
        Begins(step => (step.Positions[3], step.Positions[4]) = (0, 1)); // another sequence starts from its own position
        Begins(step => step.RowStart[1] = 0); // a sequence without rows
        Begins(step => (step.SequenceCount, step.OutputCount) = (0, 0));
        Refused("-1 output rows", step => step.OutputCount = -1);
        Refused("6 output rows", step => step.OutputCount = 6);
        Refused("Output row 1 is row 5 of 5", step => step.OutputRows[1] = 5);
        Refused("Output row 0 is row -1 of 5", step => step.OutputRows[0] = -1);
        Refused("-1 queries", step => step.QueryCount = -1);
        Refused("3 queries", step => step.QueryCount = 3);
        Assert.Equal("step", Assert.Throws<ArgumentNullException>(() => _backend.BeginStep(null!)).ParamName);

        void Begins(Action<StepLayout> change)
        {
            StepLayout step = Step();
            change(step);
            _backend.BeginStep(step);
            _backend.GatherRows(_bench.Tensor(5, 8), 0, 0, _bench.Tensor(5, 8));
        }

        void Refused(string problem, Action<StepLayout> change)
        {
            Begins(_ => { });
            StepLayout step = Step();
            change(step);
            ArgumentException error = Assert.ThrowsAny<ArgumentException>(() => _backend.BeginStep(step));
            Assert.Equal("step", error.ParamName);
            Assert.Contains(problem, error.Message);
            Assert.Throws<InvalidOperationException>(() => _backend.GatherRows(_bench.Tensor(5, 8), 0, 0, _bench.Tensor(5, 8)));
        }
    }

    [Theory]
    [InlineData(Vocabulary, "token 40 of 40")]
    [InlineData(int.MaxValue, "token 2147483647")]
    [InlineData(-1, "waits for answer 0 of 0")]
    [InlineData(int.MinValue, "waits for answer 2147483647 of 0")]
    public void A_token_that_is_in_no_table_is_refused(int token, string problem)
    {
        Weight table = _bench.Weight(Vocabulary, 24);
        Tensor output = _bench.Tensor(5, 24);
        StepLayout step = Step();
        step.TokenIds[4] = Vocabulary - 1;
        _backend.BeginStep(step);
        _backend.Embed(table, output);
        step.TokenIds[4] = token;
        _backend.BeginStep(step);
        ArgumentException error = Assert.ThrowsAny<ArgumentException>(() => _backend.Embed(table, output));
        Assert.Equal("table", error.ParamName);
        Assert.Contains(problem, error.Message);
    }

    /// <summary>A step's context is checked once a step, in every step, and also after a refusal.</summary>
    [Fact]
    public void Blocks_and_positions_outside_are_refused_in_every_step_by_every_operation()
    {
        Tensor qkv = _bench.Tensor(5, 3 * HeadDim), output = _bench.Tensor(5, HeadDim);
        for (int round = 0; round < 2; round++)
        {
            _backend.BeginStep(Step());
            Attend(_cache, _rope);
            foreach (int block in new[] { Blocks, -1, int.MaxValue, int.MinValue })
            {
                StepLayout step = Step();
                step.BlockTables[3] = block; // the second sequence's second block, which has its last row
                _backend.BeginStep(step);
                Refused("call.Cache", $"Sequence 1 has block {block} of 4", () => Attend(_cache, _rope));
                Refused("call.Cache", $"Sequence 1 has block {block} of 4", () => Attend(_cache, _rope));
            }

            // Blocks after the last position are not used.
            StepLayout near = Step();
            (near.Positions[3], near.Positions[4], near.BlockTables[3], near.BlockTables[1]) = (14, 15, -7, 99);
            _backend.BeginStep(near);
            Attend(_cache, _rope);

            // A table for positions up to 19; and one for fewer, after this one was accepted.
            StepLayout far = Step();
            (far.Positions[3], far.Positions[4]) = (18, 19);
            _backend.BeginStep(far);
            Attend(_cache, _rope);
            using RopeTable shorter = _bench.Rope(HeadDim, 19), narrower = _bench.Rope(8, 32);
            Refused("call.Rope", "Row 4 is at position 19 of 19", () => Attend(_cache, shorter));
            Refused("call.Rope", "Row 4 is at position 19 of 19", () => Attend(_cache, shorter));
            Refused("call.Rope", "For heads of 8", () => Attend(_cache, narrower));
            Attend(_cache, _rope);

            // Another cache in the same step, with fewer blocks.
            using KvCache fewer = _bench.Cache(2, Blocks - 1, 1, HeadDim), other = _bench.Cache(2, Blocks, 1, HeadDim);
            Attend(other, _rope);
            Refused("call.Cache", "Sequence 1 has block 3 of 3", () => Attend(fewer, _rope));
            Refused("call.Cache", "Sequence 1 has block 3 of 3", () => Attend(fewer, _rope));
            Attend(_cache, _rope);
        }

        void Attend(KvCache cache, RopeTable rope) => _bench.Attend(qkv, 1, rope, cache, 0, output);
    }

    [Fact]
    public void Heads_and_layers_that_a_cache_has_not_got_are_refused()
    {
        using KvCache cache = _bench.Cache(2, Blocks, 2, HeadDim);
        Tensor qkv = _bench.Tensor(5, 6 * HeadDim), output = _bench.Tensor(5, 2 * HeadDim), narrow = _bench.Tensor(5, HeadDim);
        _backend.BeginStep(Step());
        _bench.Attend(qkv, 2, _rope, cache, 1, output);
        foreach (int heads in new[] { 0, -2, 1, 3 })
            Refused("call.Heads", "multiple of the cache's 2", () => _bench.Attend(qkv, heads, _rope, cache, 1, output));
        foreach (int layer in new[] { -1, 2 })
            Refused("call.Layer", "2 layers", () => _bench.Attend(qkv, 2, _rope, cache, layer, output));
        Refused("call.Qkv", "16 columns", () => _bench.Attend(narrow, 2, _rope, cache, 1, output));
        Refused("call.Output", "16 columns", () => _bench.Attend(qkv, 2, _rope, cache, 1, narrow));
        Refused("from", "4 blocks", () => _backend.CopyBlock(cache, 4, 0));
        Refused("to", "4 blocks", () => _backend.CopyBlock(cache, 0, 4));
        Refused("from", "4 blocks", () => _backend.CopyBlock(cache, -1, 0));
        _backend.CopyBlock(cache, 3, 0);
    }

    /// <summary>A call that fits one layer is refused for another.</summary>
    [Fact]
    public void Tensors_and_heads_are_checked_against_the_layout_of_the_layer()
    {
        using KvCache cache = _backend.AllocateKvCache(Blocks, new KvLayout(2, 24, 16), new KvLayout(1, 16, 40), new KvLayout(1, 24, 24));
        Tensor qkv = _bench.Tensor(5, (4 * 24) + (2 * (24 + 16))), output = _bench.Tensor(5, 4 * 16);
        Tensor other = _bench.Tensor(5, (3 * 16) + 16 + 40), wide = _bench.Tensor(5, 3 * 40), oneWidth = _bench.Tensor(5, 4 * 24);
        using RopeTable rope = _bench.Rope(24, 20);
        Weight norm = _bench.Weight(1, 24), otherNorm = _bench.Weight(1, 16);
        _backend.BeginStep(Step());
        _bench.Attend(qkv, 4, rope, cache, 0, output, 1f, norm, norm);
        _bench.Attend(other, 3, _rope, cache, 1, wide, 1f, otherNorm, otherNorm);
        Refused("call.Qkv", "176 columns, needed 104", () => _bench.Attend(qkv, 3, _rope, cache, 1, wide));
        Refused("call.Qkv", "176 columns, needed 144", () => _bench.Attend(qkv, 4, rope, cache, 2, oneWidth));
        Refused("call.Output", "96 columns, needed 64", () => _bench.Attend(qkv, 4, rope, cache, 0, oneWidth));
        Refused("call.Output", "64 columns, needed 120", () => _bench.Attend(other, 3, _rope, cache, 1, output));
        Refused("call.Rope", "For heads of 16, the cache has 24", () => _bench.Attend(qkv, 4, _rope, cache, 0, output));
        Refused("call.Rope", "For heads of 24, the cache has 16", () => _bench.Attend(other, 3, rope, cache, 1, wide));
        Refused("call.QueryNorm", "needed a vector of 24", () => _bench.Attend(qkv, 4, rope, cache, 0, output, queryNorm: otherNorm));
        Refused("call.KeyNorm", "needed a vector of 16", () => _bench.Attend(other, 3, _rope, cache, 1, wide, keyNorm: norm));
        Refused("call.Heads", "multiple of the cache's 2", () => _bench.Attend(qkv, 3, rope, cache, 0, output));
        Refused("layers", "at most 512", () => _backend.AllocateKvCache(1, new KvLayout(1, 514, 16)));
        Refused("layers", "at most 512", () => _backend.AllocateKvCache(1, new KvLayout(1, 16, 16), new KvLayout(1, 16, 513)));
        _backend.AllocateKvCache(1, new KvLayout(1, 512, 512)).Dispose();
    }

    [Fact]
    public void A_matmul_into_its_own_input_is_refused_and_one_of_no_rows_does_nothing()
    {
        Weight square = _bench.Weight(24, 24);
        Tensor x = _bench.Tensor(3, 24), y = _bench.Tensor(3, 24);
        float[] before = Bench.Read(x, 3), other = Bench.Read(y, 3);
        Refused("input", "same tensor", () => _backend.MatMul(x, square, null, x, 3));
        Refused("input", "same tensor", () => _backend.MatMulAdd(x, square, null, x, 3));
        _backend.MatMul(x, square, null, y, 0);
        _backend.MatMulAdd(x, square, null, y, 0);
        Bench.SameBits(before, Bench.Read(x, 3), "input");
        Bench.SameBits(other, Bench.Read(y, 3), "output");
    }

    [Fact]
    public void A_query_that_makes_no_sense_is_refused()
    {
        Tensor logits = _bench.Tensor(2, Vocabulary);
        Answered((ref SampleQuery query) => { });
        Problem("target 40 of 40", (ref SampleQuery query) => query.Target = Vocabulary);
        Answered((ref SampleQuery query) => query.Target = Vocabulary - 1);
        Problem("temperature", (ref SampleQuery query) => query.Temperature = float.NaN);
        Problem("temperature -1E-45", (ref SampleQuery query) => query.Temperature = -float.Epsilon);
        Answered((ref SampleQuery query) => query.Temperature = 0f);
        Problem("top-p is not a number", (ref SampleQuery query) => query.TopP = float.NaN);
        Problem("min-p NaN", (ref SampleQuery query) => query.MinP = float.NaN);
        Problem("min-p 1.0000001", (ref SampleQuery query) => query.MinP = MathF.BitIncrement(1f));
        Answered((ref SampleQuery query) => query.MinP = 1f);
        Problem("biases out of range", (ref SampleQuery query) => query.BiasCount = -1);
        Problem("biases out of range", (ref SampleQuery query) => (query.BiasStart, query.BiasCount) = (-1, 1));
        Problem("biases out of range", (ref SampleQuery query) => (query.BiasStart, query.BiasCount) = (2, 2));
        Problem("biases out of range", (ref SampleQuery query) => (query.BiasStart, query.BiasCount) = (int.MaxValue, 1));
        Answered((ref SampleQuery query) => (query.BiasStart, query.BiasCount) = (1, 1));
        Problem("bias for token 40 of 40", (ref SampleQuery query) => (query.BiasStart, query.BiasCount) = (1, 2));
        Problem("-1 alternatives", (ref SampleQuery query) => query.AlternativesCount = -1);
        Problem("41 alternatives", (ref SampleQuery query) => query.AlternativesCount = Vocabulary + 1);
        Problem("alternatives out of range", (ref SampleQuery query) => (query.AlternativesStart, query.AlternativesCount) = (6, 40));
        Problem("alternatives out of range", (ref SampleQuery query) => (query.AlternativesStart, query.AlternativesCount) = (-1, 1));
        Answered((ref SampleQuery query) => (query.AlternativesStart, query.AlternativesCount) = (5, Vocabulary));
        Problem("output indices do not ascend", (ref SampleQuery query) => query.OutputIndex = -1);

        _backend.BeginStep(Step());
        Refused("first", "2 output rows", () => _backend.Sample(logits, 3, 0));
        Refused("first", "2 output rows", () => _backend.Sample(logits, -1, 1));
        Refused("count", "2 output rows", () => _backend.Sample(logits, 1, 2));
        Refused("count", "2 output rows", () => _backend.Sample(logits, 0, -1));
        _backend.Sample(logits, 2, 0);
        _backend.Sample(logits, 1, 1);

        void Problem(string problem, Change change)
        {
            StepLayout step = Step();
            change(ref step.Queries[1]);
            _backend.BeginStep(step);
            Refused("step", $"Query 1: {problem}", () => _backend.Sample(logits, 0, 2));
        }

        void Answered(Change change)
        {
            StepLayout step = Step();
            change(ref step.Queries[1]);
            _backend.BeginStep(step);
            _backend.Sample(logits, 0, 2);
            Assert.All(step.Results, result => Assert.InRange(result.Token, 0, Vocabulary - 1));
        }
    }

    [Fact]
    public void Weights_of_another_shape_backend_or_type_are_refused()
    {
        using CpuBackend another = new(1);
        Weight weight = _bench.Weight(6, 4), turned = _bench.Weight(4, 6), vector = _bench.Weight(1, 24);
        Weight foreign = new Bench(another).Weight(6, 4);
        Refused("destination", "[4, 6], needed [6, 4]", () => _backend.CopyWeight(weight, turned));
        Refused("destination", "[1, 24], needed [6, 4]", () => _backend.CopyWeight(weight, vector));
        Refused("destination", "another backend", () => _backend.CopyWeight(weight, foreign));
        Refused("source", "another backend", () => _backend.CopyWeight(foreign, weight));
        Refused("source", "no whole rows", () => _backend.WriteWeight(weight, 4, new byte[2 * 6], DType.BFloat16));
        Refused("source", "no whole rows", () => _backend.WriteWeight(weight, 2, new byte[2 * 4], DType.BFloat16));
        Refused("source", "the weight has 24", () => _backend.WriteWeight(weight, 24, new byte[2 * 4], DType.BFloat16));
        Refused("element", "24 elements", () => _backend.WriteWeight(weight, 28, [], DType.BFloat16));
        Refused("type", "", () => _backend.WriteWeight(weight, 0, new byte[16], (DType)7));
        Refused("type", "", () => _backend.WriteWeightElements(weight, 0, [0], new byte[4], (DType)7));
        Refused("indices", "Index 4 from element 20", () => _backend.WriteWeightElements(weight, 20, [3, 4], new byte[8], DType.Float32));
        Refused("indices", "Index 4294967295", () => _backend.WriteWeightElements(weight, 1, [uint.MaxValue], new byte[4], DType.Float32));
        Refused("element", "24 elements", () => _backend.WriteWeightElements(weight, 25, [], [], DType.Float32));
        _backend.WriteWeightElements(weight, 20, [3], new byte[4], DType.Float32);
        _backend.WriteWeightElements(weight, 24, [], [], DType.Float32);
        _backend.WriteWeight(weight, 24, [], DType.Float32);
        _backend.ReadWeight(weight, 24, []);

        // A vector takes any part.
        _backend.WriteWeight(vector, 23, new byte[4], DType.Float32);
        Refused("source", "the weight has 24", () => _backend.WriteWeight(vector, 23, new byte[8], DType.Float32));
        Tensor x = _bench.Tensor(2, 8);
        Assert.Equal("destination", Assert.Throws<ArgumentException>(() => x.Read(2, new float[15])).ParamName);
        Assert.Equal("source", Assert.Throws<ArgumentException>(() => x.Write(2, new float[15])).ParamName);
        Assert.Throws<ArgumentOutOfRangeException>(() => x.Read(3, new float[24]));
        Assert.Throws<ArgumentOutOfRangeException>(() => x.Write(-1, new float[24]));
        Assert.Throws<ArgumentNullException>("destination", () => _backend.CopyWeight(weight, null!));
    }

    private delegate void Change(ref SampleQuery query);

    private static void Refused(string name, string problem, Action action)
    {
        ArgumentException error = Assert.ThrowsAny<ArgumentException>(action);
        Assert.Equal(name, error.ParamName);
        Assert.Contains(problem, error.Message);
    }

    /// <summary>Three rows of one sequence and two of another, two blocks each.</summary>
    private static StepLayout Step()
    {
        StepLayout step = new(5, 2, 2, 2, 45, 3) { SequenceCount = 2, OutputCount = 2, QueryCount = 2 };
        (step.RowStart[1], step.RowStart[2]) = (3, 5);
        int[] positions = [0, 1, 2, 15, 16], blocks = [0, 1, 2, 3];
        positions.CopyTo(step.Positions, 0);
        blocks.CopyTo(step.BlockTables, 0);
        (step.OutputRows[0], step.OutputRows[1]) = (2, 4);
        (step.Queries[0], step.Queries[1]) = (Bench.Query(0), Bench.Query(1));
        (step.BiasIds[0], step.BiasIds[1], step.BiasIds[2]) = (-3, 39, Vocabulary);
        return step;
    }
}
