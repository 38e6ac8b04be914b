using System.Diagnostics;
using System.Globalization;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// Device memory between real processes: mapped by CUDA IPC, and copied by NCCL, also when the other one dies, is late, or queues something
/// else.
/// </summary>
public sealed class PeersTests
{
    private const string HandleVariable = "ROLLOUT_TEST_HANDLE", RankVariable = "ROLLOUT_TEST_RANK", WhatVariable = "ROLLOUT_TEST_WHAT";
    private const int Bytes = 3_000_017;

    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);

    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    // ---- CUDA IPC.

    [Fact]
    public async Task Another_process_reads_and_writes_what_is_shared()
    {
        SimulatedDevice.Require();
        using CudaDevice device = new(0);
        using DeviceBuffer before = device.Allocate(1001); // so that the buffer does not start the allocation
        using DeviceBuffer buffer = device.Allocate(Bytes);
        device.Upload(buffer.Pointer, Pattern(1));
        using OtherProcess peer = OtherProcess.Run(
            $"{nameof(PeersTests)}.{nameof(Opens_the_handle)}",
            (HandleVariable, Hex(buffer.Share())));
        await peer.Succeeded();
        byte[] read = new byte[Bytes];
        device.Download(buffer.Pointer, read);
        Assert.Equal(Pattern(2), read);
    }

    [Fact]
    public void A_handle_of_this_process_is_refused_by_name()
    {
        SimulatedDevice.Require();
        using CudaDevice device = new(0);
        using DeviceBuffer buffer = device.Allocate(100);
        CudaException error = Assert.Throws<CudaException>(() => device.Open(buffer.Share()));
        Assert.Matches( // which of the two depends on the driver's version
            "^cuIpcOpenMemHandle_v2 \\(memory of another process\\): CUDA_ERROR_INVALID_(VALUE|CONTEXT),", error.Message);
    }

    [Fact(Explicit = true)]
    public void Opens_the_handle()
    {
        SimulatedDevice.Require();
        using CudaDevice device = new(0);
        using PeerBuffer peer = device.Open(Of<CUipcMemHandle>(Environment.GetEnvironmentVariable(HandleVariable)!));
        byte[] read = new byte[Bytes];
        device.Download(peer.Pointer, read);
        Assert.Equal(Pattern(1), read);
        device.Upload(peer.Pointer, Pattern(2));
    }

    /// <summary>
    /// The parts of an update by CUDA IPC: a tensor of another process, checked and written to a part of a fused weight, without a copy on
    /// this host.
    /// </summary>
    [Theory]
    [InlineData(DType.BFloat16, WeightFormat.BFloat16)]
    [InlineData(DType.Float32, WeightFormat.BFloat16)]
    [InlineData(DType.Float16, WeightFormat.Float32)]
    public async Task A_tensor_of_another_process_is_digested_and_written_where_it_lies(DType type, WeightFormat format)
    {
        SimulatedDevice.Require();
        const int Rows = 24, Columns = 40, FirstRow = 16;
        using CudaBackend backend = new(0, format);
        using DeviceBuffer letterbox = backend.Device.AllocateZeroed(65); // a handle, and whether it is written
        using OtherProcess trainer = OtherProcess.Run($"{nameof(PeersTests)}.{nameof(Shares_a_tensor)}",
            (HandleVariable, Hex(letterbox.Share())),
            (WhatVariable, (Rows * Columns * type.Size()).ToString(CultureInfo.InvariantCulture)));
        WaitFor(backend.Device, letterbox.Pointer + 64, 1);
        byte[] handle = new byte[64];
        backend.Device.Download(letterbox.Pointer, handle);

        byte[] bytes = Pattern(7)[..(Rows * Columns * type.Size())];
        using Weight fused = backend.AllocateWeight(48, Columns), expected = backend.AllocateWeight(48, Columns);
        nuint place;
        using (DeviceBytes peer = backend.Peers.Open(handle))
        {
            place = peer.Pointer;
            Assert.Equal(bytes.Length, peer.Bytes);
            WeightRange store = new(0, Rows * Columns, fused, FirstRow * Columns);
            Assert.Equal(
                System.IO.Hashing.XxHash128.Hash(bytes), backend.Peers.Apply([new DeviceTensor(peer, 0, bytes.Length, type, [store])]));
        }

        // The mapping has been released: the other process's memory is not accessible any more.
        Assert.Throws<CudaException>(() => backend.Device.Download(place, new byte[1]));

        backend.WriteWeight(expected, FirstRow * Columns, bytes, type);
        float[] written = new float[48 * Columns], wanted = new float[48 * Columns];
        backend.ReadWeight(fused, 0, written);
        backend.ReadWeight(expected, 0, wanted);
        Assert.Equal(wanted, written);
        Assert.Contains(written, value => value != 0);
        backend.Device.Upload(letterbox.Pointer + 64, [2]); // the other process may end
        await trainer.Succeeded();
    }

    [Fact(Explicit = true)]
    public void Shares_a_tensor()
    {
        SimulatedDevice.Require();
        using CudaDevice device = new(0);
        int bytes = int.Parse(Environment.GetEnvironmentVariable(WhatVariable)!, CultureInfo.InvariantCulture);
        using DeviceBuffer tensor = device.Allocate(bytes);
        device.Upload(tensor.Pointer, Pattern(7)[..bytes]);
        using PeerBuffer letterbox = device.Open(Of<CUipcMemHandle>(Environment.GetEnvironmentVariable(HandleVariable)!));
        device.Upload(letterbox.Pointer, Convert.FromHexString(Hex(tensor.Share())));
        device.Upload(letterbox.Pointer + 64, [1]);
        WaitFor(device, letterbox.Pointer + 64, 2);
    }

    private static void WaitFor(CudaDevice device, nuint pointer, byte value)
    {
        byte[] read = [0];
        for (long start = Stopwatch.GetTimestamp(); read[0] != value; Thread.Sleep(5))
        {
            device.Download(pointer, read);
            Assert.True(Stopwatch.GetElapsedTime(start) < s_deadline, "the other process did not answer");
        }
    }

    // ---- NCCL.

    [Fact]
    public async Task Broadcasts_of_any_rank_reach_all()
    {
        SimulatedDevice.RequireSimulated(); // NCCL wants a GPU a rank
        using CudaDevice device = new(0);
        ncclUniqueId id = NcclCommunicator.NewId();
        using OtherProcess one = Rank(1, 3, id, "broadcast"), two = Rank(2, 3, id, "broadcast");
        using (NcclCommunicator communicator = device.Connect(id, 3, 0, s_deadline, Cancelled))
            Broadcasts(device, communicator, 0);
        await one.Succeeded();
        await two.Succeeded();
    }

    [Fact]
    public async Task A_rank_that_dies_is_an_error_and_the_device_goes_on()
    {
        SimulatedDevice.RequireSimulated(); // NCCL wants a GPU a rank
        using Pair pair = new("die");
        CudaException error = Assert.Throws<CudaException>(() => pair.Receive(s_deadline));
        Assert.EndsWith("): remote process exited or there was a network error", error.Message, StringComparison.Ordinal);
        Assert.True(pair.Communicator.IsClosed);
        pair.GoesOn();
        await pair.Peer.Ended();
    }

    [Fact]
    public void A_rank_that_does_nothing_ends_at_the_deadline_and_the_device_goes_on()
    {
        SimulatedDevice.RequireSimulated(); // NCCL wants a GPU a rank
        int before = SimulatedDevice.Communicators;
        using Pair pair = new("sleep");
        TimeoutException error = Assert.Throws<TimeoutException>(() => pair.Receive(TimeSpan.FromSeconds(0.2)));
        Assert.Equal("NCCL: a broadcast did not finish within 0.2 s.", error.Message);
        Assert.True(pair.Communicator.IsClosed);
        Assert.Equal(before, SimulatedDevice.Communicators); // or the other rank's work on this device would never end
        pair.GoesOn();
    }

    [Fact]
    public void A_rank_that_never_comes_ends_at_the_deadline()
    {
        SimulatedDevice.RequireSimulated(); // NCCL wants a GPU a rank
        using CudaDevice device = new(0);
        int before = SimulatedDevice.Communicators;
        TimeoutException error = Assert.Throws<TimeoutException>(
            () => device.Connect(NcclCommunicator.NewId(), 2, 0, TimeSpan.FromSeconds(0.1), Cancelled));
        Assert.Equal("NCCL: not all of 2 ranks joined within 0.1 s.", error.Message);
        Assert.Equal(before, SimulatedDevice.Communicators);
    }

    /// <summary>More ranks than the simulated library supports: it refuses them after the communicator is created.</summary>
    [Fact]
    public void A_start_that_fails_half_way_leaves_no_communicator()
    {
        SimulatedDevice.RequireSimulated();
        using CudaDevice device = new(0);
        int before = SimulatedDevice.Communicators;
        CudaException error = Assert.Throws<CudaException>(() => device.Connect(NcclCommunicator.NewId(), 1025, 0, s_deadline, Cancelled));
        Assert.Equal("ncclCommInitRankConfig (rank 0 of 1025): internal error", error.Message);
        Assert.Equal(before, SimulatedDevice.Communicators);
    }

    [Fact]
    public async Task Ranks_that_ask_for_different_sizes_are_an_error()
    {
        SimulatedDevice.RequireSimulated(); // NCCL wants a GPU a rank
        using Pair pair = new("send less");
        CudaException error = Assert.Throws<CudaException>(() => pair.Receive(s_deadline));
        Assert.EndsWith("): invalid usage", error.Message, StringComparison.Ordinal);
        await pair.Peer.Succeeded();
    }

    [Fact(Explicit = true)]
    public void Is_a_rank()
    {
        SimulatedDevice.Require();
        string[] ranks = Environment.GetEnvironmentVariable(RankVariable)!.Split('/');
        int rank = int.Parse(ranks[0], CultureInfo.InvariantCulture);
        using CudaDevice device = new(0);
        using NcclCommunicator communicator = device.Connect(
            Of<ncclUniqueId>(Environment.GetEnvironmentVariable(HandleVariable)!),
            int.Parse(ranks[1], CultureInfo.InvariantCulture), rank, s_deadline, Cancelled);
        switch (Environment.GetEnvironmentVariable(WhatVariable))
        {
            case "broadcast":
                Broadcasts(device, communicator, rank);
                break;
            case "die":
                Process.GetCurrentProcess().Kill();
                break;
            case "sleep":
                Thread.Sleep(s_deadline);
                break;
            case "send less":
                using (DeviceBuffer buffer = device.AllocateZeroed(10))
                {
                    communicator.Broadcast(buffer.Pointer, buffer.Pointer, 10, 1, device.Stream, s_deadline);
                    communicator.Synchronize(device.Stream, s_deadline, Cancelled);
                }

                break;
        }
    }

    private static OtherProcess Rank(int rank, int ranks, ncclUniqueId id, string what) => OtherProcess.Run(
        $"{nameof(PeersTests)}.{nameof(Is_a_rank)}",
        (HandleVariable, Hex(id)),
        (RankVariable, $"{rank.ToString(CultureInfo.InvariantCulture)}/{ranks.ToString(CultureInfo.InvariantCulture)}"),
        (WhatVariable, what));

    /// <summary>What every rank does: three broadcasts, queued one after another, of ranks 0, 2 and 0.</summary>
    private static void Broadcasts(CudaDevice device, NcclCommunicator communicator, int rank)
    {
        int[] roots = [0, 2, 0];
        DeviceBuffer[] buffers = [.. roots.Select(_ => device.AllocateZeroed(Bytes))];
        for (int i = 0; i < roots.Length; i++)
        {
            if (roots[i] == rank)
                device.Upload(buffers[i].Pointer, Pattern(i));
        }

        for (int i = 0; i < roots.Length; i++)
            communicator.Broadcast(buffers[i].Pointer, buffers[i].Pointer, Bytes, roots[i], device.Stream, s_deadline);
        communicator.Synchronize(device.Stream, s_deadline, Cancelled);
        for (int i = 0; i < roots.Length; i++)
        {
            byte[] read = new byte[Bytes];
            device.Download(buffers[i].Pointer, read);
            Assert.Equal(Pattern(i), read);
            buffers[i].Dispose();
        }
    }

    /// <summary>This process as rank 0 and another as rank 1, the root of the broadcast.</summary>
    private sealed class Pair : IDisposable
    {
        private readonly CudaDevice _device = new(0);
        private readonly DeviceBuffer _buffer;

        public Pair(string what)
        {
            ncclUniqueId id = NcclCommunicator.NewId();
            Peer = Rank(1, 2, id, what);
            Communicator = _device.Connect(id, 2, 0, s_deadline, Cancelled);
            _buffer = _device.AllocateZeroed(Bytes);
        }

        public OtherProcess Peer { get; }

        public NcclCommunicator Communicator { get; }

        /// <summary>The other rank's failure may be noticed while the broadcast is queued, or when it is waited for.</summary>
        public void Receive(TimeSpan deadline)
        {
            Communicator.Broadcast(_buffer.Pointer, _buffer.Pointer, Bytes, 1, _device.Stream, s_deadline);
            Communicator.Synchronize(_device.Stream, deadline, Cancelled);
        }

        public void GoesOn()
        {
            byte[] read = new byte[Bytes];
            _device.Upload(_buffer.Pointer, Pattern(5));
            _device.Download(_buffer.Pointer, read);
            Assert.Equal(Pattern(5), read);
        }

        public void Dispose()
        {
            _buffer.Dispose();
            Communicator.Dispose();
            Peer.Dispose();
            _device.Dispose();
        }
    }

    private static byte[] Pattern(int seed)
    {
        byte[] bytes = new byte[Bytes];
        new Random(seed).NextBytes(bytes);
        return bytes;
    }

    private static string Hex<T>(T value)
        where T : unmanaged => Convert.ToHexString(MemoryMarshal.AsBytes(new ReadOnlySpan<T>(in value)));

    private static T Of<T>(string hex)
        where T : unmanaged => Unsafe.ReadUnaligned<T>(ref Convert.FromHexString(hex)[0]);
}
