namespace Rollout.Kernels.Tests;

/// <summary>What a step allocates, and which calls are refused.</summary>
public abstract partial class BackendTests
{
    [Fact]
    public void Nothing_managed_is_allocated_after_warm_up()
    {
        Assert.SkipUnless(AllocatesNothing, "The reference allocates as it likes.");
        Bench bench = New();
        Backend backend = bench.Backend;
        const int Rows = 24, HeadDim = 32, Heads = 4, KvHeads = 2, Hidden = 96, Vocabulary = 1000;
        StepLayout step = new(Rows, Rows, 4, Rows, 50, 4) { SequenceCount = Rows, OutputCount = Rows, QueryCount = Rows };
        for (int s = 0; s < Rows; s++)
        {
            (step.RowStart[s + 1], step.Positions[s], step.TokenIds[s], step.OutputRows[s]) = (s + 1, s + 20, s, s);
            for (int b = 0; b < 4; b++)
                step.BlockTables[(s * 4) + b] = (s * 4) + b;
            step.Queries[s] = Bench.Query(s, s % 2, topK: s % 3 * 7, topP: s % 5 == 0 ? 0.8f : 1f, minP: s % 7 == 0 ? 0.01f : 0f);
        }

        step.Queries[3].AlternativesCount = 50;
        step.Queries[4].BiasCount = 4;
        Weight table = bench.Weight(Vocabulary, Hidden), scale = bench.Weight(1, Hidden), qkvWeight = bench.Weight(256, Hidden);
        Tensor hidden = backend.AllocateTensor(Rows, Hidden), normed = backend.AllocateTensor(Rows, Hidden);
        Tensor qkv = backend.AllocateTensor(Rows, 256), attended = backend.AllocateTensor(Rows, Heads * HeadDim);
        Tensor gated = backend.AllocateTensor(Rows, 128), logits = backend.AllocateTensor(Rows, Vocabulary);
        Weight output = bench.Weight(Hidden, Heads * HeadDim);
        KvCache cache = bench.Cache(1, Rows * 4, KvHeads, HeadDim);
        RopeTable rope = bench.Rope(HeadDim, 64);

        void Run()
        {
            backend.BeginStep(step);
            backend.Embed(table, hidden);
            backend.RmsNorm(hidden, scale, 1e-6f, normed, Rows);
            backend.MatMul(normed, qkvWeight, null, qkv, Rows);
            bench.Attend(qkv, Heads, rope, cache, 0, attended, 0.2f);
            backend.MatMulAdd(attended, output, null, hidden, Rows);
            backend.GatedSilu(qkv, gated, Rows);
            backend.GatherRows(hidden, 0, Rows, normed);
            backend.MatMul(normed, table, null, logits, Rows);
            backend.Sample(logits, 0, Rows);
            backend.FinishStep(step);
            backend.CopyBlock(cache, 0, 1);
        }

        for (int i = 0; i < 20; i++)
            Run();

        // All threads of the process count, so an allocation of another thread may occur in one of the trials, but not in all. This
        // thread's own may occur in one at most: 6 KB were seen once in a run of all tests, of unknown origin; an allocation of the step
        // itself would occur in every trial.
        long least = long.MaxValue;
        int trialsWithOwn = 0;
        for (int trial = 0; trial < 20 && least > 0; trial++)
        {
            long ownBefore = GC.GetAllocatedBytesForCurrentThread(), before = GC.GetTotalAllocatedBytes(precise: true);
            for (int i = 0; i < 5; i++)
                Run();
            trialsWithOwn += GC.GetAllocatedBytesForCurrentThread() > ownBefore ? 1 : 0;
            least = Math.Min(least, GC.GetTotalAllocatedBytes(precise: true) - before);

            // Long enough for the other threads to sleep, so that waking them is measured as well.
            Thread.Sleep(5);
        }

        Assert.Equal(0, least);
        Assert.InRange(trialsWithOwn, 0, 1);
    }

    [Fact]
    public void Wrong_arguments_are_refused_by_name()
    {
        Bench bench = New();
        Backend backend = bench.Backend;
        using ReferenceBackend other = new();
        Tensor x = bench.Tensor(4, 64), y = bench.Tensor(4, 40), foreign = other.AllocateTensor(4, 64), dead = bench.Tensor(4, 64);
        dead.Dispose();
        Weight w = bench.Weight(40, 64), vector = bench.Weight(1, 64), shortVector = bench.Weight(1, 63);
        KvCache cache = bench.Cache(2, 4, 2, 16);
        RopeTable rope = bench.Rope(16, 20), otherRope = bench.Rope(32, 20);
        Tensor qkv = bench.Tensor(4, 128), attended = bench.Tensor(4, 64);
        StepLayout step = Bench.Step(2, 2, s => (s, s + 2), (s, b) => s);
        step.OutputCount = 2;
        backend.BeginStep(step);

        Refused("input", () => backend.MatMul(y, w, null, y, 1));
        Refused("output", () => backend.MatMul(x, w, null, x, 1));
        Refused("residual", () => backend.MatMulAdd(x, w, null, x, 1));
        Refused("weight", () => backend.MatMul(x, vector, null, bench.Tensor(4, 1), 1));
        Refused("bias", () => backend.MatMul(x, w, vector, y, 1));
        Refused(null, () => backend.MatMul(x, w, null, y, 5));
        Refused(null, () => backend.MatMul(x, w, null, y, -1));
        Refused("input", () => backend.MatMul(foreign, w, null, y, 1));
        Refused("input", () => backend.MatMul(dead, w, null, y, 1));
        Refused("scale", () => backend.RmsNorm(x, shortVector, 0f, x, 1));
        Refused("scale", () => backend.RmsNorm(x, w, 0f, x, 1));
        Refused("output", () => backend.RmsNorm(x, vector, 0f, y, 1));
        Refused("scale", () => backend.RmsNormAdd(x, shortVector, 0f, bench.Tensor(4, 64), 1));
        Refused("residual", () => backend.RmsNormAdd(x, vector, 0f, y, 1));
        Refused("input", () => backend.RmsNormAdd(x, vector, 0f, x, 1));
        Refused("input", () => backend.RmsNormAdd(foreign, vector, 0f, x, 1));
        Refused("gateUp", () => backend.GatedSilu(x, y, 1));
        Refused("output", () => backend.Embed(w, y));
        Refused("call.Heads", () => bench.Attend(qkv, 3, rope, cache, 0, attended));
        Refused("call.Layer", () => bench.Attend(qkv, 4, rope, cache, 2, attended));
        Refused("call.Layer", () => bench.Attend(qkv, 4, rope, cache, -1, attended));
        Refused("call.Qkv", () => bench.Attend(x, 4, rope, cache, 0, attended));
        Refused("call.Rope", () => bench.Attend(qkv, 4, otherRope, cache, 0, attended));
        Refused("call.QueryNorm", () => bench.Attend(qkv, 4, rope, cache, 0, attended, queryNorm: shortVector));
        Refused("call.KeyNorm", () => bench.Attend(qkv, 4, rope, cache, 0, attended, keyNorm: shortVector));
        Refused("call.Output", () => bench.Attend(qkv, 4, rope, cache, 0, y));
        Refused("call.Output", () => bench.Attend(qkv, 4, rope, cache, 0, foreign));
        Refused("call.Cache", () => bench.Attend(qkv, 4, rope, null!, 0, attended));
        Refused("first", () => backend.Sample(y, 3, 0));
        Refused("count", () => backend.Sample(y, 0, 3));
        Refused("count", () => backend.GatherRows(x, 1, 2, x));
        Refused("from", () => backend.CopyBlock(cache, 4, 0));
        Refused("to", () => backend.CopyBlock(cache, 0, -1));
        Refused("element", () => backend.WriteWeight(w, -1, new byte[4], DType.Float32));
        Refused("source", () => backend.WriteWeight(w, (40 * 64) - 1, new byte[8], DType.Float32));
        Refused("source", () => backend.WriteWeight(w, 0, new byte[3], DType.BFloat16));
        Refused("source", () => backend.WriteWeight(w, 0, new byte[4], DType.Float32));
        Refused("source", () => backend.WriteWeight(w, 1, new byte[64 * 4], DType.Float32));
        Refused("element", () => backend.WriteWeightElements(w, -1, [], [], DType.Float32));
        Refused("indices", () => backend.WriteWeightElements(w, 1, [(40 * 64) - 1], new byte[4], DType.Float32));
        Refused("values", () => backend.WriteWeightElements(w, 0, [0, 1], new byte[4], DType.Float32));
        Refused("destination", () => backend.CopyWeight(w, vector));
        Refused("destination", () => backend.ReadWeight(w, 1, new float[40 * 64]));
        Refused("layers", () => bench.Cache(1, 1, 1, 7));
        Refused(null, () => backend.AllocateTensor(0, 1));
        Refused(null, () => backend.AllocateWeight(1, 0));

        step.TokenIds[1] = 40;
        Refused("table", () => backend.Embed(w, x));
        step.BlockTables[0] = 4;
        backend.BeginStep(step); // a step is not changed once it has begun
        Refused("call.Cache", () => bench.Attend(qkv, 4, rope, cache, 0, attended));
        Refused("call.Cache", () => bench.Attend(qkv, 4, rope, cache, 0, attended));
        step.Positions[3] = 40;
        Refused("step", () => backend.BeginStep(step));

        static void Refused(string? name, Action action)
        {
            ArgumentException error = Assert.ThrowsAny<ArgumentException>(action);
            if (name != null)
                Assert.Equal(name, error.ParamName);
        }
    }
}
