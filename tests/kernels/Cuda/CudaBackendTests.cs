using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>The CUDA backend on the simulated device: what every backend promises.</summary>
public abstract class CudaBackendTests(WeightFormat format) : BackendTests
{
    protected override WeightFormat Format => format;

    protected override bool HasOwnValueWidths => false;

    /// <summary>Each draw runs a block of 256 fibers.</summary>
    protected override int Draws => 1000;

    protected override Backend Create()
    {
        SimulatedDevice.Require();
        return new CudaBackend(0, format);
    }

    [Fact]
    public void Keys_and_values_of_different_or_too_large_widths_are_refused()
    {
        using Backend backend = Create();
        KvLayout good = new(1, 16, 16);
        foreach (KvLayout wrong in (KvLayout[])[new(2, 24, 16), new(1, 16, 40), new(1, 16, 15), new(1, 258, 258)])
        {
            Assert.Throws<ArgumentOutOfRangeException>("layers", () => backend.AllocateKvCache(2, wrong));
            Assert.Throws<ArgumentOutOfRangeException>("layers", () => backend.AllocateKvCache(2, good, wrong));
        }
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void A_matmul_into_a_tensor_that_is_kept_rounded_is_rounded_once(bool withBias)
    {
        using Backend backend = Create();
        Bench bench = new(backend);
        const int Rows = 5, Inputs = 40, Outputs = 24;
        Tensor input = bench.Tensor(Rows, Inputs);
        Tensor whole = backend.AllocateTensor(Rows, Outputs), rounded = backend.AllocateTensor(Rows, Outputs, rounded: true);
        Weight weight = bench.Weight(Outputs, Inputs);
        Weight? bias = withBias ? bench.Weight(1, Outputs) : null;
        long bytes = rounded.Bytes;
        Assert.Equal(Rows * Outputs * (format == WeightFormat.Float32 ? sizeof(float) : sizeof(ushort)), bytes);
        backend.MatMul(input, weight, bias, whole, Rows);
        backend.MatMul(input, weight, bias, rounded, Rows);
        Assert.Equal(withBias && format == WeightFormat.BFloat16, rounded.Bytes > bytes); // sums in fp32 are needed for a bias alone
        float[] sums = Bench.Read(whole, Rows), found = Bench.Read(rounded, Rows);
        for (int i = 0; i < sums.Length; i++)
            Assert.InRange(found[i], sums[i] - (Math.Abs(sums[i]) * Rounding), sums[i] + (Math.Abs(sums[i]) * Rounding));

        // Its readers take it in this form.
        Tensor half = backend.AllocateTensor(Rows, Outputs / 2), same = backend.AllocateTensor(Rows, Outputs / 2);
        backend.GatedSilu(rounded, half, Rows);
        backend.GatedSilu(bench.Tensor(Outputs, found), same, Rows);
        Bench.SameBits(Bench.Read(same, Rows), Bench.Read(half, Rows), "gated");
    }

    /// <summary>A step without answers is finished once it is sent; the device may still be running it.</summary>
    [Theory]
    [InlineData(false, 1)]
    [InlineData(true, 0)]
    public void A_write_waits_for_a_step_that_still_reads_the_weight(bool withAnswer, int waits)
    {
        SimulatedDevice.RequireSimulated();
        using CudaBackend backend = new(0, format);
        Bench bench = new(backend);
        Weight read = bench.Weight(8, 16), unread = bench.Weight(8, 16);
        Tensor output = backend.AllocateTensor(1, 16), logits = bench.Tensor(1, 8);
        StepLayout step = Bench.Step(1, 1, _ => (0, 1), (_, _) => 0);
        if (withAnswer)
        {
            (step.OutputCount, step.QueryCount, step.OutputRows[0], step.Queries[0]) = (1, 1, 0, Bench.Query(0));
        }

        backend.BeginStep(step);
        backend.Embed(read, output);
        if (withAnswer)
            backend.Sample(logits, 0, 1);
        backend.FinishStep(step);
        Assert.Equal(Synchronisations(unread) + waits, Synchronisations(read));

        long Synchronisations(Weight weight)
        {
            SimulatedDevice.Counters before = SimulatedDevice.Count();
            backend.WriteWeight(weight, 0, new byte[8 * 16 * sizeof(float)], DType.Float32);
            return (SimulatedDevice.Count() - before).Synchronisations;
        }
    }
}

public sealed class CudaFp32Tests() : CudaBackendTests(WeightFormat.Float32);

public sealed class CudaBf16Tests() : CudaBackendTests(WeightFormat.BFloat16)
{
    /// <summary>bf16 has 8 bits of a number.</summary>
    protected override double Rounding => 1.0 / 256;
}
