using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>Lists of launches as graphs.</summary>
public sealed class CudaCommandsTests
{
    private const int Columns = 8;

    [Fact]
    public void A_list_that_was_recorded_goes_as_a_graph_and_any_other_launch_by_launch()
    {
        SimulatedDevice.RequireSimulated();
        using Device device = new();
        device.Note(rows: 1);
        device.Note(rows: 2);
        SimulatedDevice.Counters before = SimulatedDevice.Count();
        device.Commands.Record();
        SimulatedDevice.Counters recorded = SimulatedDevice.Count() - before;
        Assert.Equal((0, 1), (recorded.Launches, recorded.Graphs));

        foreach (int[] list in (int[][])[[1], [1, 2], [1, 2], [2, 1]])
        {
            before = SimulatedDevice.Count();
            long graphs = device.Commands.GraphLaunches;
            foreach (int rows in list)
                device.Note(rows);
            device.Commands.Send();
            Assert.Equal(list is [1, 2] ? 1 : 0, device.Commands.GraphLaunches - graphs);
            Assert.Equal((list.Length, 0), ((SimulatedDevice.Count() - before).Launches, (SimulatedDevice.Count() - before).Graphs));
        }
    }

    /// <summary>Rows that share a long prefix use another attention kernel, with the same arguments.</summary>
    [Theory]
    [InlineData("kernel")]
    [InlineData("blocks")]
    [InlineData("threads")]
    public void A_list_that_differs_in_what_is_launched_alone_is_not_the_one_that_was_recorded(string what)
    {
        SimulatedDevice.RequireSimulated();
        using Device device = new();
        device.Note(rows: 1);
        device.Commands.Record();
        device.Note(rows: 1, threads: what == "threads" ? 128 : 256, blocks: what == "blocks" ? 2 : 1, widens: what == "kernel");
        device.Commands.Send();
        Assert.Equal(0, device.Commands.GraphLaunches);
        device.Note(rows: 1);
        device.Commands.Send();
        Assert.Equal(1, device.Commands.GraphLaunches);
    }

    [Fact]
    public void Graphs_that_use_memory_that_ends_are_given_up()
    {
        SimulatedDevice.RequireSimulated();
        using Device device = new();
        device.Note(rows: 1);
        device.Commands.Record();
        device.Commands.Forget(device.Output.Pointer + (nuint)device.Output.Bytes, 100);
        device.Note(rows: 1);
        device.Commands.Send();
        Assert.Equal(1, device.Commands.GraphLaunches);
        device.Commands.Forget(device.Output.Pointer, 1);
        device.Note(rows: 1);
        device.Commands.Send();
        Assert.Equal(1, device.Commands.GraphLaunches);
    }

    /// <summary>Ending a failed capture fails too, with a less specific error.</summary>
    [Fact]
    public void An_error_names_the_launch_that_fails_in_a_capture_and_the_stream_stays_usable()
    {
        SimulatedDevice.RequireSimulated();
        using Device device = new();
        device.Note(rows: 1, threads: 4096);
        CudaException error = Assert.Throws<CudaException>(device.Commands.Record);
        Assert.StartsWith("cuLaunchKernelEx (round_values", error.Message, StringComparison.Ordinal);
        device.Commands.Clear();
        device.Note(rows: 1);
        device.Commands.Send();
        device.Cuda.Stream.Synchronize();
    }

    private sealed class Device : IDisposable
    {
        private readonly CudaKernels _kernels;
        private readonly CudaMatMul _matMul;
        private readonly DeviceBuffer _input;

        public Device()
        {
            _kernels = new CudaKernels(Cuda, storesFp32: false);
            _matMul = new CudaMatMul(Cuda, _kernels, storesFp32: false, CudaCompiler.CacheFolder);
            _input = Cuda.AllocateZeroed(2 * Columns * sizeof(float));
            Output = Cuda.AllocateZeroed(2 * Columns * sizeof(ushort));
            Commands = new CudaCommands(Cuda, _kernels, _matMul);
        }

        public CudaDevice Cuda { get; } = new(0);

        public DeviceBuffer Output { get; }

        public CudaCommands Commands { get; }

        public void Note(int rows, int threads = 256, int blocks = 1, bool widens = false) => Commands.Launch(
            widens ? _kernels.Widen : _kernels.Round, new Grid(blocks), threads, 0, _input.Pointer, Output.Pointer, (long)rows * Columns);

        public void Dispose()
        {
            Commands.Dispose();
            Output.Dispose();
            _input.Dispose();
            _matMul.Dispose();
            _kernels.Dispose();
            Cuda.Dispose();
        }
    }
}
