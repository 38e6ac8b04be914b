using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>A device that fails: the engine says so to everybody, and keeps nobody waiting.</summary>
public sealed class FaultTests
{
    [Fact]
    public async Task A_device_failure_ends_all_samples_with_the_reason_and_refuses_new_ones()
    {
        FailingBackend backend = new() { StepsLeft = 30 };
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, new EngineOptions { MaxSequences = 4 });
        GroupRequest request = new() { Id = "a", Prompt = [5, 6, 7], N = 6, MaxTokens = 400, IgnoreEos = true, StreamTokens = true };
        Group group = engine.Submit(request);
        Group waiting = engine.Submit(request with { Id = "b" });
        await Task.WhenAll(group.Completed, waiting.Completed).WaitAsync(TimeSpan.FromSeconds(30), TestContext.Current.CancellationToken);

        Assert.All(group.Samples.Concat(waiting.Samples), sample => Assert.Equal(FinishReason.Error, sample.FinishReason));
        Assert.All(group.Samples, sample => Assert.Contains("device lost", sample.Error, StringComparison.Ordinal));
        Assert.True(group.Samples[0].Published > 10); // what was sampled before is kept
        Assert.Equal(EngineState.Faulted, engine.Status.State);
        Assert.Contains("device lost", engine.Status.Reason, StringComparison.Ordinal);
        Assert.Throws<EngineFaultedException>(() => engine.Submit(request with { Id = "c" }));
        await Assert.ThrowsAsync<EngineFaultedException>(() => engine.ResumeAsync());
        Assert.Equal(0, (await engine.AbortAsync(ids: null)).Groups);
    }

    /// <summary>The CPU, until it is lost.</summary>
    private sealed class FailingBackend : IBackend
    {
        private readonly CpuBackend _cpu = new(1);

        public int StepsLeft { get; set; }

        public string Name => "failing";

        public Tensor AllocateTensor(int rows, int columns) => _cpu.AllocateTensor(rows, columns);

        public Weight AllocateWeight(int outputs, int inputs) => _cpu.AllocateWeight(outputs, inputs);

        public KvCache AllocateKvCache(int layers, int blocks, int kvHeads, int headDim) => _cpu.AllocateKvCache(layers, blocks, kvHeads, headDim);

        public RopeTable AllocateRopeTable(ReadOnlySpan<float> inverseFrequencies, int positions, float scale)
            => _cpu.AllocateRopeTable(inverseFrequencies, positions, scale);

        public void WriteWeight(Weight destination, long element, ReadOnlySpan<byte> source, DType type)
            => _cpu.WriteWeight(destination, element, source, type);

        public void ReadWeight(Weight source, long element, Span<float> destination) => _cpu.ReadWeight(source, element, destination);

        public void BeginStep(StepLayout step)
        {
            if (StepsLeft-- == 0) throw new InvalidOperationException("device lost");
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
}
