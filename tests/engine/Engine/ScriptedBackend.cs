using System.Text;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>A device, the CPU unless another is given, as a test wants it: lost or held after so many steps, or out of memory.</summary>
internal sealed class ScriptedBackend(IBackend? device = null) : IBackend
{
    private readonly IBackend _inner = device ?? new CpuBackend(1);
    private readonly StringBuilder _order = new();
    private readonly ManualResetEventSlim _held = new();
    private readonly ManualResetEventSlim _letGo = new();
    private int _stepsUntilHeld = int.MaxValue;

    public int StepsLeft { get; set; } = int.MaxValue;

    public bool RehearsalsFail { get; set; }

    /// <summary>Where given, weights are not written: where they would be, and how many bytes, is kept here.</summary>
    public List<(long Element, int Bytes)>? Writes { get; set; }

    /// <summary>Weights that slept find no memory to wake into.</summary>
    public bool RestoresFail { get; set; }

    /// <summary>B where a step began, F where it was finished. To be read when no step runs.</summary>
    public string Order => _order.ToString();

    /// <summary>What it claims to have left.</summary>
    public long AvailableBytes { get; set; } = long.MaxValue;

    public long HeldBytes => _inner.HeldBytes;

    public int KvElementBytes => _inner.KvElementBytes;

    /// <summary>The device's own, unless a test says.</summary>
    public long KvCacheBudget { get => field >= 0 ? field : _inner.KvCacheBudget; set; } = -1;

    public int LogitRows => _inner.LogitRows;

    public string Name => "scripted";

    /// <summary>Lets so many steps begin and holds the loop at the next. Call it while no step runs.</summary>
    public void HoldAfter(int steps)
    {
        _held.Reset();
        _letGo.Reset();
        _stepsUntilHeld = steps;
    }

    public void WaitUntilHeld() => Assert.True(_held.Wait(TimeSpan.FromMinutes(1)), "the loop never came to the step at which it is held");

    /// <summary>Lets the loop go on, if wanted to where it is held next.</summary>
    public void LetGo(int thenHoldAfter = int.MaxValue)
    {
        _stepsUntilHeld = thenHoldAfter;
        _held.Reset();
        _letGo.Set();
    }

    public Tensor AllocateTensor(int rows, int columns, bool rounded = false) => _inner.AllocateTensor(rows, columns, rounded);

    public Weight AllocateWeight(int outputs, int inputs) => _inner.AllocateWeight(outputs, inputs);

    public WeightArena AllocateWeights(IReadOnlyList<(int Outputs, int Inputs)> shapes) => new Arena(this, _inner.AllocateWeights(shapes));

    public KvCache AllocateKvCache(int layers, int blocks, int kvHeads, int headDim) => _inner.AllocateKvCache(layers, blocks, kvHeads, headDim);

    public RopeTable AllocateRopeTable(ReadOnlySpan<float> inverseFrequencies, int positions, float scale)
        => _inner.AllocateRopeTable(inverseFrequencies, positions, scale);

    public void WriteWeight(Weight destination, long element, ReadOnlySpan<byte> source, DType type)
    {
        if (Writes is null) _inner.WriteWeight(destination, element, source, type);
        else Writes.Add((element, source.Length));
    }

    public WeightFormat WeightFormat => _inner.WeightFormat;

    public int WriteRows => _inner.WriteRows;

    public void WriteWeightElements(Weight destination, long element, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type)
        => _inner.WriteWeightElements(destination, element, indices, values, type);

    public void CopyWeight(Weight source, Weight destination) => _inner.CopyWeight(source, destination);

    public void ReadWeight(Weight source, long element, Span<float> destination) => _inner.ReadWeight(source, element, destination);

    public int StepsUnderWay => _inner.StepsUnderWay;

    public int StepTokens => _inner.StepTokens;

    public IEnumerable<StepLayout> Rehearsals(StepLayout room) => _inner.Rehearsals(room);

    public void BeginStep(StepLayout step)
    {
        if (step.IsRehearsal)
        {
            if (RehearsalsFail) throw new InvalidOperationException("no memory for graphs");
            _inner.BeginStep(step);
            return;
        }

        if (_stepsUntilHeld-- == 0)
        {
            _held.Set();
            if (!_letGo.Wait(TimeSpan.FromMinutes(1))) throw new TimeoutException("the test never let the loop go");
            _letGo.Reset();
        }

        if (StepsLeft-- == 0) throw new InvalidOperationException("device lost");
        _order.Append('B');
        _inner.BeginStep(step);
    }

    public void Embed(Weight table, Tensor output) => _inner.Embed(table, output);

    public void RmsNorm(Tensor input, Weight scale, float epsilon, Tensor output, int rows)
        => _inner.RmsNorm(input, scale, epsilon, output, rows);

    public void MatMul(Tensor input, Weight weight, Weight? bias, Tensor output, int rows) => _inner.MatMul(input, weight, bias, output, rows);

    public void MatMulAdd(Tensor input, Weight weight, Weight? bias, Tensor residual, int rows)
        => _inner.MatMulAdd(input, weight, bias, residual, rows);

    public void RopeStoreKv(Tensor qkv, int heads, Weight? queryNorm, Weight? keyNorm, float epsilon, RopeTable rope, KvCache cache, int layer)
        => _inner.RopeStoreKv(qkv, heads, queryNorm, keyNorm, epsilon, rope, cache, layer);

    public void Attend(Tensor qkv, int heads, float scale, KvCache cache, int layer, Tensor output)
        => _inner.Attend(qkv, heads, scale, cache, layer, output);

    public void GatedSilu(Tensor gateUp, Tensor output, int rows) => _inner.GatedSilu(gateUp, output, rows);

    public void GatherRows(Tensor input, int first, int count, Tensor output) => _inner.GatherRows(input, first, count, output);

    public void Sample(Tensor logits, int first, int count) => _inner.Sample(logits, first, count);

    public void FinishStep(StepLayout step)
    {
        _order.Append('F');
        _inner.FinishStep(step);
    }

    public void CopyBlock(KvCache cache, int from, int to) => _inner.CopyBlock(cache, from, to);

    public void Dispose() => _inner.Dispose();

    private sealed class Arena(ScriptedBackend backend, WeightArena inner) : WeightArena(inner.Weights)
    {
        public override long Bytes => inner.Bytes;

        public override void Discard() => inner.Discard();

        public override void Restore()
        {
            if (backend.RestoresFail) throw new OutOfMemoryException("the trainer has it");
            inner.Restore();
        }

        public override void Dispose() => inner.Dispose();
    }
}
