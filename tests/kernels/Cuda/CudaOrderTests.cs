using System.Runtime.InteropServices;
using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// Steps, and work concurrent with them, on a device that is as late as possible: the simulated one does a stream's work only when it is
/// waited for. Code that misses a necessary wait reads old contents, or changes what is still being read.
/// </summary>
public sealed class CudaOrderTests : IDisposable
{
    private const int Hidden = 16, Tokens = 8;

    private readonly CudaBackend _backend;
    private readonly Bench _bench;
    private DeviceBuffer? _source;

    public CudaOrderTests()
    {
        SimulatedDevice.Require();
        _backend = new CudaBackend(0);
        _bench = new Bench(_backend, 3);
    }

    public static TheoryData<string> Writes => ["as stored", "converted", "single elements", "a copy", "from the device"];

    public void Dispose()
    {
        _source?.Dispose();
        _backend.Dispose();
    }

    /// <summary>Else a step would wait for all of an update that is queued, however large.</summary>
    [Fact]
    public void Steps_go_before_what_runs_beside_them() =>
        Assert.True(_backend.Device.Stream.Priority < _backend.Device.Beside.Priority);

    [Theory, MemberData(nameof(Writes))]
    public void A_step_reads_what_was_written_before_it(string how)
    {
        Weight table = _bench.Weight(Tokens, Hidden);
        Tensor output = _backend.AllocateTensor(1, Hidden);
        Begin(withAnswer: false); // allocates memory, which waits
        Write(table, how);
        Begin(withAnswer: false);
        _backend.Embed(table, output);
        Assert.All(Bench.Read(output, 1), value => Assert.Equal(3f, value));
    }

    /// <summary>Nothing waits for the end of a step without answers, so the writer has to.</summary>
    [Theory]
    [InlineData("embed")]
    [InlineData("norm")]
    [InlineData("matmul")]
    [InlineData("bias")]
    [InlineData("norm of queries")]
    [InlineData("norm of keys")]
    public void A_step_that_nobody_waited_for_has_read_the_weights_as_they_were(string reader)
    {
        float[][] results = new float[2][];
        foreach (bool overwritten in (bool[])[false, true])
        {
            Bench bench = new(_backend, 7);
            Weight table = bench.Weight(Tokens, Hidden), matrix = bench.Weight(3 * Hidden, Hidden), scale = bench.Weight(1, Hidden);
            Weight bias = bench.Weight(1, 3 * Hidden), queryNorm = bench.Weight(1, Hidden), keyNorm = bench.Weight(1, Hidden);
            Tensor x = _backend.AllocateTensor(1, Hidden), normed = _backend.AllocateTensor(1, Hidden);
            Tensor qkv = _backend.AllocateTensor(1, 3 * Hidden);
            Tensor attended = _backend.AllocateTensor(1, Hidden);
            KvCache cache = _bench.Cache(1, 1, 1, Hidden);
            RopeTable rope = bench.Rope(Hidden, 4);
            for (int i = 0; i < 2; i++) // the first one allocates memory and chooses algorithms, which waits
            {
                StepLayout step = Begin(withAnswer: false, position: i);
                _backend.Embed(table, x);
                _backend.RmsNorm(x, scale, 1e-6f, normed, 1);
                _backend.MatMul(normed, matrix, bias, qkv, 1);
                bench.Attend(qkv, 1, rope, cache, 0, attended, 3f, queryNorm, keyNorm, 1e-6f);
                _backend.FinishStep(step);
            }

            Weight written = reader switch
            {
                "embed" => table,
                "norm" => scale,
                "matmul" => matrix,
                "bias" => bias,
                "norm of queries" => queryNorm,
                _ => keyNorm,
            };
            if (overwritten)
            {
                _backend.WriteWeight(
                    written, 0, MemoryMarshal.AsBytes<float>(Enumerable.Repeat(2f, written.Outputs * written.Inputs).ToArray()),
                    DType.Float32);
            }

            results[overwritten ? 1 : 0] = Bench.Read(attended, 1);
        }

        Bench.SameBits(results[0], results[1], reader);
    }

    [Theory, MemberData(nameof(Writes))]
    public void Whatever_writes_a_weight_waits_for_the_step_that_nobody_waited_for(string how)
    {
        Weight table = _bench.Weight(Tokens, Hidden), same = _backend.AllocateWeight(Tokens, Hidden);
        _backend.CopyWeight(table, same);
        Tensor output = _backend.AllocateTensor(1, Hidden);
        Write(same, how); // allocates memory, which waits
        float[] expected = new float[Hidden];
        _backend.ReadWeight(table, 0, expected);
        for (int i = 0; i < 2; i++)
        {
            StepLayout step = Begin(withAnswer: false);
            _backend.Embed(table, output);
            _backend.FinishStep(step);
        }

        Write(table, how);
        Assert.Equal(expected, Bench.Read(output, 1));
    }

    /// <summary>Which tokens of the previous step may be used: as many as it has queries, and none where it has no answers.</summary>
    [Fact]
    public void A_token_that_the_step_before_did_not_answer_is_refused()
    {
        Weight table = _bench.Weight(Tokens, Hidden);
        Tensor output = _backend.AllocateTensor(3, Hidden), logits = _bench.Tensor(3, Tokens);
        Ask(2);
        Refused(~2, 2);
        Ask(2);
        Ask(1);
        Refused(~1, 1);
        Ask(2);
        StepLayout without = Begin(withAnswer: false);
        _backend.Embed(table, output);
        _backend.FinishStep(without);
        Refused(~0, 0);

        void Ask(int queries)
        {
            StepLayout step = Bench.Queries(Bench.Query(0), Bench.Query(1), Bench.Query(2)); // has room for more
            (step.SequenceCount, step.OutputCount, step.QueryCount) = (queries, queries, queries);
            _backend.BeginStep(step);
            _backend.Sample(logits, 0, queries);
            _backend.FinishStep(step);
        }

        void Refused(int token, int answers)
        {
            StepLayout step = Fill(new StepLayout(1, 1, 1, 1, 0, 0), withAnswer: true, 0);
            step.TokenIds[0] = token;
            _backend.BeginStep(step);
            ArgumentException error = Assert.Throws<ArgumentException>(() => _backend.Embed(table, output));
            Assert.StartsWith($"Row 0 waits for answer {~token} of {answers}.", error.Message, StringComparison.Ordinal);
        }
    }

    /// <summary>
    /// Rows of a step planned ahead are in another order than the queries whose answers they use, and some of those sequences end.
    /// </summary>
    [Fact]
    public void Each_row_that_is_planned_ahead_takes_the_answer_of_its_own_query()
    {
        Weight table = _backend.AllocateWeight(Tokens, Hidden);
        _backend.WriteWeight(
            table, 0, MemoryMarshal.AsBytes<float>(Enumerable.Range(0, Tokens * Hidden).Select(i => (float)(i / Hidden)).ToArray()),
            DType.Float32);
        int[] answers = [5, 2, 7, 0, 3], asked = [3, 0, 4, 2];
        float[] logits = [.. answers.SelectMany(answer => Enumerable.Range(0, Tokens).Select(v => v == answer ? 4f : 0f))];
        StepLayout first = Bench.Queries([.. answers.Select((_, q) => Bench.Query(q, 0f))]);
        StepLayout second = Bench.Queries([.. asked.Select((_, q) => Bench.Query(q, 0f))]);
        _backend.BeginStep(first);
        _backend.Sample(_bench.Tensor(Tokens, logits), 0, answers.Length);
        Tensor output = _backend.AllocateTensor(asked.Length, Hidden), other = _bench.Tensor(asked.Length, Tokens);
        for (int row = 0; row < asked.Length; row++)
            second.TokenIds[row] = ~asked[row];
        _backend.BeginStep(second);
        _backend.Embed(table, output);
        _backend.Sample(other, 0, asked.Length);
        _backend.FinishStep(first);
        _backend.FinishStep(second);
        float[] rows = Bench.Read(output, asked.Length);
        Assert.Equal(asked.Select(query => (float)answers[query]), Enumerable.Range(0, asked.Length).Select(row => rows[row * Hidden]));
    }

    [Fact]
    public void Answers_belong_to_the_step_that_is_finished_though_the_next_is_queued()
    {
        const int Steps = 6;
        float[][] logits =
            [.. Enumerable.Range(0, Steps).Select(i => Enumerable.Range(0, Tokens).Select(v => v == i % Tokens ? 5f : 0f).ToArray())];
        Tensor[] tensors = [.. logits.Select(row => _bench.Tensor(Tokens, row))];
        StepLayout[] layouts = [WithRoom(), WithRoom()];
        for (int i = 0; i <= Steps; i++)
        {
            if (i < Steps)
            {
                StepLayout step = layouts[i % 2];
                step.Queries[0] = Bench.Query(temperature: 0f) with { AlternativesCount = 2, AlternativesStart = 1 };
                _backend.BeginStep(step);
                _backend.Sample(tensors[i], 0, 1);
            }

            if (i == 0)
                continue;
            StepLayout finished = layouts[(i - 1) % 2];
            _backend.FinishStep(finished);
            Assert.Equal((i - 1) % Tokens, finished.Results[0].Token);
            Assert.Equal((i - 1) % Tokens, finished.AlternativeIds[1]);
            Assert.Equal(finished.Results[0].LogProb, finished.AlternativeLogProbs[1]);
        }

        static StepLayout WithRoom() => Fill(new StepLayout(1, 1, 1, 1, 3, 0), withAnswer: true, 0);
    }

    /// <summary>
    /// A step's token is the answer of the previous step. Where that found none, the row's result is unused, and the row reads no invalid
    /// memory.
    /// </summary>
    [Theory]
    [InlineData(false, 5)]
    [InlineData(true, 0)]
    public void A_token_of_the_step_before_is_its_answer_or_any_where_it_found_none(bool forbidden, int expected)
    {
        Weight table = _backend.AllocateWeight(Tokens, Hidden);
        float[] rows = [.. Enumerable.Range(0, Tokens * Hidden).Select(i => (float)(i / Hidden))];
        _backend.WriteWeight(table, 0, MemoryMarshal.AsBytes<float>(rows), DType.Float32);
        float[] logits = new float[2 * Tokens];
        logits[5] = 4f; // the answer of query 0, which is the one used; query 1 finds another
        logits[Tokens + 2] = 4f;
        if (forbidden)
            Array.Fill(logits, float.NaN, 0, Tokens);
        StepLayout first = Bench.Queries(Bench.Query(0, 0f), Bench.Query(1, 0f));
        _backend.BeginStep(first);
        _backend.Sample(_bench.Tensor(Tokens, logits), 0, 2);
        StepLayout second = Fill(new StepLayout(1, 1, 1, 1, 0, 0), withAnswer: true, 0);
        second.TokenIds[0] = ~0;
        Tensor output = _backend.AllocateTensor(1, Hidden), other = _bench.Tensor(1, Tokens);
        _backend.BeginStep(second);
        _backend.Embed(table, output);
        _backend.Sample(other, 0, 1);
        _backend.FinishStep(first);
        _backend.FinishStep(second);
        Assert.All(Bench.Read(output, 1), value => Assert.Equal(expected, value));
    }

    /// <summary>A copy of a block includes what the step has stored before, whether those launches were queued or only collected.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void A_copied_block_has_what_the_step_under_way_stored_in_every_layer(bool noted)
    {
        const int Layers = 3;
        KvCache cache = _bench.Cache(Layers, 3, 1, Hidden);
        RopeTable rope = _bench.Rope(Hidden, 32);
        float[] values = _bench.Values(2 * 3 * Hidden), next = _bench.Values(3 * Hidden);
        StepLayout step = Bench.Step(1, 2, _ => (0, 2), (_, _) => 0);
        if (noted)
            (step.OutputCount, step.QueryCount, step.OutputRows[0], step.Queries[0]) = (1, 1, 1, Bench.Query(0));
        _backend.BeginStep(step);
        Tensor attended = _backend.AllocateTensor(2, Hidden);
        for (int layer = 0; layer < Layers; layer++)
        {
            Tensor own = _bench.Tensor(3 * Hidden, [.. values.Select(value => value * (layer + 1))]);
            _bench.Attend(own, 1, rope, cache, layer, attended);
        }

        _backend.CopyBlock(cache, 0, 2);
        if (noted)
            _backend.Sample(_bench.Tensor(1, Tokens), 0, 1);
        _backend.FinishStep(step);
        for (int layer = 0; layer < Layers; layer++)
            Bench.SameBits(Next(0), Next(2), $"layer {layer}");

        // Of the token after them, which attends to both in one block or the other.
        float[] Next(int block)
        {
            List<float> all = [];
            for (int layer = 0; layer < Layers; layer++)
            {
                _backend.BeginStep(Bench.Step(1, 2, _ => (2, 3), (_, _) => block));
                Tensor x = _bench.Tensor(3 * Hidden, next), output = _backend.AllocateTensor(1, Hidden);
                _bench.Attend(x, 1, rope, cache, layer, output);
                all.AddRange(Bench.Read(output, 1));
            }

            return [.. all];
        }
    }

    /// <summary>Discarding memory after a step that was not waited for.</summary>
    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void Memory_that_a_queued_step_uses_goes_when_that_is_done(int which)
    {
        using WeightArena arena = _backend.AllocateWeights([(Tokens, Hidden), (3 * Hidden, Hidden)]);
        KvCache cache = _bench.Cache(1, 1, 1, Hidden);
        Tensor x = _backend.AllocateTensor(1, Hidden), qkv = _backend.AllocateTensor(1, 3 * Hidden);
        Tensor attended = _backend.AllocateTensor(1, Hidden);
        RopeTable rope = _bench.Rope(Hidden, 4);
        DeviceMemory memory = which switch { 0 => arena, 1 => cache, 2 => rope, _ => qkv };
        for (int i = 0; i < 2; i++)
        {
            StepLayout step = Begin(withAnswer: false, position: i);
            _backend.Embed(arena.Weights[0], x);
            _backend.MatMul(x, arena.Weights[1], null, qkv, 1);
            _bench.Attend(qkv, 1, rope, cache, 0, attended, 3f);
            _backend.FinishStep(step);
        }

        memory.Discard();
        Assert.All(Bench.Read(attended, 1), value => Assert.True(float.IsFinite(value)));
        memory.Restore();
    }

    /// <summary>
    /// The two layouts used in turn may have room for different numbers of biases; on the device the values start at one place.
    /// </summary>
    [Fact]
    public void Biases_of_steps_with_different_room_reach_their_tokens()
    {
        int[] rooms = [2, 900, 2, 5, 2000, 2, 900];
        Tensor logits = _bench.Tensor(1, 4000, 0.1f);
        for (int i = 0; i < rooms.Length; i++)
        {
            StepLayout step = Fill(new StepLayout(1, 1, 1, 1, 0, rooms[i]), withAnswer: true, 0);
            for (int b = 0; b < rooms[i]; b++)
                (step.BiasIds[b], step.BiasValues[b]) = (b * 2, b == rooms[i] - 1 ? 9f : -1f);
            step.Queries[0] = Bench.Query(temperature: 0f) with { BiasCount = rooms[i] };
            _backend.BeginStep(step);
            _backend.Sample(logits, 0, 1);
            _backend.FinishStep(step);
            Assert.Equal((rooms[i] - 1) * 2, step.Results[0].Token);
        }
    }

    private StepLayout Begin(bool withAnswer, int position = 0)
    {
        StepLayout step = Fill(new StepLayout(1, 1, 1, 1, 0, 0), withAnswer, position);
        _backend.BeginStep(step);
        return step;
    }

    private static StepLayout Fill(StepLayout step, bool withAnswer, int position)
    {
        (step.SequenceCount, step.RowStart[1], step.Positions[0]) = (1, 1, position);
        if (withAnswer)
            (step.OutputCount, step.QueryCount, step.Queries[0]) = (1, 1, Bench.Query(0));
        return step;
    }

    /// <summary>3 in all elements.</summary>
    private void Write(Weight table, string how)
    {
        const int Elements = Tokens * Hidden;
        byte[] fp32 = MemoryMarshal.AsBytes<float>(Enumerable.Repeat(3f, Elements).ToArray()).ToArray();
        switch (how)
        {
            case "as stored":
                _backend.WriteWeight(
                    table, 0, MemoryMarshal.AsBytes<ushort>(Enumerable.Repeat((ushort)0x4040, Elements).ToArray()),
                    DType.BFloat16);
                break;
            case "converted":
                _backend.WriteWeight(table, 0, fp32, DType.Float32);
                break;
            case "single elements":
                _backend.WriteWeightElements(table, 0, [.. Enumerable.Range(0, Elements).Select(i => (uint)i)], fp32, DType.Float32);
                break;
            case "a copy":
                Weight from = _backend.AllocateWeight(Tokens, Hidden);
                _backend.WriteWeight(from, 0, fp32, DType.Float32);
                _backend.CopyWeight(from, table);
                break;
            default:
                if (_source is null) // not freed: freeing it would wait for all queued work, as filling it does
                {
                    _source = _backend.Device.Allocate(fp32.Length);
                    _backend.Device.Upload(_source.Pointer, fp32);
                }

                DeviceBytes all = new(_source);
                _backend.Apply([new DeviceTensor(all, 0, all.Bytes, DType.Float32, [new WeightRange(0, Elements, table, 0)])]);
                break;
        }
    }
}
