using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>The CPU as a test wants it: lost or held after so many steps, or out of memory.</summary>
internal sealed class ScriptedBackend : IBackend
{
    private readonly CpuBackend _cpu = new(1);
    private readonly ManualResetEventSlim _held = new();
    private readonly ManualResetEventSlim _letGo = new();
    private int _stepsUntilHeld = int.MaxValue;

    public int StepsLeft { get; set; } = int.MaxValue;

    /// <summary>What it claims to have left.</summary>
    public long AvailableBytes { get; set; } = long.MaxValue;

    public long HeldBytes => _cpu.HeldBytes;

    public int KvElementBytes => _cpu.KvElementBytes;

    public long KvCacheBudget => _cpu.KvCacheBudget;

    public int LogitRows => _cpu.LogitRows;

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

    public Tensor AllocateTensor(int rows, int columns) => _cpu.AllocateTensor(rows, columns);

    public Weight AllocateWeight(int outputs, int inputs) => _cpu.AllocateWeight(outputs, inputs);

    public KvCache AllocateKvCache(int layers, int blocks, int kvHeads, int headDim) => _cpu.AllocateKvCache(layers, blocks, kvHeads, headDim);

    public RopeTable AllocateRopeTable(ReadOnlySpan<float> inverseFrequencies, int positions, float scale)
        => _cpu.AllocateRopeTable(inverseFrequencies, positions, scale);

    public void WriteWeight(Weight destination, long element, ReadOnlySpan<byte> source, DType type)
        => _cpu.WriteWeight(destination, element, source, type);

    public WeightFormat WeightFormat => _cpu.WeightFormat;

    public int WriteRows => _cpu.WriteRows;

    public void WriteWeightElements(Weight destination, long element, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type)
        => _cpu.WriteWeightElements(destination, element, indices, values, type);

    public void CopyWeight(Weight source, Weight destination) => _cpu.CopyWeight(source, destination);

    public void ReadWeight(Weight source, long element, Span<float> destination) => _cpu.ReadWeight(source, element, destination);

    public void BeginStep(StepLayout step)
    {
        if (StepsLeft-- == 0) throw new InvalidOperationException("device lost");
        if (_stepsUntilHeld-- == 0)
        {
            _held.Set();
            if (!_letGo.Wait(TimeSpan.FromMinutes(1))) throw new TimeoutException("the test never let the loop go");
            _letGo.Reset();
        }

        _cpu.BeginStep(step);
    }

    public void Embed(Weight table, Tensor output) => _cpu.Embed(table, output);

    public void RmsNorm(Tensor input, Weight scale, float epsilon, Tensor output, int rows)
        => _cpu.RmsNorm(input, scale, epsilon, output, rows);

    public void MatMul(Tensor input, Weight weight, Weight? bias, Tensor output, int rows) => _cpu.MatMul(input, weight, bias, output, rows);

    public void MatMulAdd(Tensor input, Weight weight, Weight? bias, Tensor residual, int rows)
        => _cpu.MatMulAdd(input, weight, bias, residual, rows);

    public void RopeStoreKv(Tensor qkv, int heads, Weight? queryNorm, Weight? keyNorm, float epsilon, RopeTable rope, KvCache cache, int layer)
        => _cpu.RopeStoreKv(qkv, heads, queryNorm, keyNorm, epsilon, rope, cache, layer);

    public void Attend(Tensor qkv, int heads, float scale, KvCache cache, int layer, Tensor output)
        => _cpu.Attend(qkv, heads, scale, cache, layer, output);

    public void GatedSilu(Tensor gateUp, Tensor output, int rows) => _cpu.GatedSilu(gateUp, output, rows);

    public void GatherRows(Tensor input, int first, int count, Tensor output) => _cpu.GatherRows(input, first, count, output);

    public void Sample(Tensor logits, int first, int count) => _cpu.Sample(logits, first, count);

    public void CopyBlock(KvCache cache, int from, int to) => _cpu.CopyBlock(cache, from, to);

    public void Dispose() => _cpu.Dispose();
}
