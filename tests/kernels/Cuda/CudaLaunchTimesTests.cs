using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

public sealed class CudaLaunchTimesTests
{
    /// <summary>A measured step launches every kernel separately, names each, and computes the same as its graph.</summary>
    [Fact]
    public void A_measured_step_names_every_launch_and_gives_the_same_answers()
    {
        SimulatedDevice.Require();
        using CudaBackend backend = new(0);
        using Weight weight = backend.AllocateWeight(24, 16), ones = backend.AllocateWeight(1, 16);
        using Tensor hidden = backend.AllocateTensor(1, 16), normed = backend.AllocateTensor(1, 16, rounded: true);
        using Tensor logits = backend.AllocateTensor(1, 24);
        backend.WriteWeight(weight, 0, Bytes(24 * 16, i => MathF.Sin(i)), DType.Float32);
        backend.WriteWeight(ones, 0, Bytes(16, _ => 1), DType.Float32);
        StepLayout step = new(1, 1, 1, 1, 0, 0) { SequenceCount = 1, OutputCount = 1, QueryCount = 1 };
        step.RowStart[1] = 1;
        step.TokenIds[0] = 3;
        step.Queries[0] = new SampleQuery { Target = -1, Temperature = 1, TopP = 1, Position = 1 };
        SampleResult expected = Run();
        foreach (StepLayout rehearsal in backend.Rehearsals(step))
            Queue(rehearsal);
        Assert.Equal(expected, Run());
        Assert.Equal(1, backend.GraphLaunches);

        using CudaLaunchTimes times = new(backend.Device);
        backend.Device.Times = times;
        Assert.Equal(expected, Run());
        Assert.Equal(1, backend.GraphLaunches);
        IReadOnlyList<(string Name, int Launches, double Seconds)> taken = times.Take();
        Assert.Equal(
            [("embed", 2), ("rms_norm", 1), ("matmul [24, 16]", 1), ("sample", 1)],
            taken.Select(kernel => (kernel.Name, kernel.Launches)));
        Assert.All(taken, kernel => Assert.InRange(kernel.Seconds, 0, 10));
        Assert.Empty(times.Take());
        backend.Device.Times = null;
        Assert.Equal(expected, Run());
        Assert.Equal(2, backend.GraphLaunches);

        SampleResult Run()
        {
            Queue(step);
            backend.FinishStep(step);
            return step.Results[0];
        }

        void Queue(StepLayout queued)
        {
            backend.BeginStep(queued);
            backend.Embed(weight, hidden);
            backend.Embed(weight, hidden);
            backend.RmsNorm(hidden, ones, 1e-6f, normed, 1);
            backend.MatMul(normed, weight, null, logits, 1);
            backend.Sample(logits, 0, 1);
        }

        static byte[] Bytes(int count, Func<int, float> value) =>
            [.. Enumerable.Range(0, count).SelectMany(i => BitConverter.GetBytes(value(i)))];
    }
}
