using System.Diagnostics;
using System.Net.Sockets;
using System.Reflection;
using Google.Protobuf;
using Grpc.Core;
using Grpc.Net.Client;
using Rollout.Client;
using Rollout.Kernels;
using Rollout.V1;

namespace Rollout.Load;

/// <summary>
/// Weight updates of Shape S against a real sidecar in its own process, over its socket. Every round measures every path and the machine's
/// own copies, so that noise affects all equally; a number is the median of the rounds.
/// </summary>
internal sealed class WeightUpdates : IDisposable
{
    /// <summary>Between 256 KiB and 16 MiB there was no difference outside the noise; this is what the client library sends.</summary>
    private const int ChunkBytes = 1 << 20;

    private const int MaxContext = 2048;

    private static readonly TimeSpan s_stepWindow = TimeSpan.FromSeconds(1);

    private readonly GrpcChannel _channel;
    private readonly WeightsService.WeightsServiceClient _weights;
    private readonly RolloutService.RolloutServiceClient _rollout;
    private readonly ControlService.ControlServiceClient _control;
    private readonly UpdatePayload _payload;
    private readonly byte[] _copy;
    private readonly CancellationToken _cancellation;
    private ulong _version;
    private string? _noInPlace;
    private string? _filled; // the segment that holds the payload

    private WeightUpdates(string socketPath, UpdatePayload payload, CancellationToken cancellation)
    {
        _channel = Open(socketPath);
        _weights = new WeightsService.WeightsServiceClient(_channel);
        _rollout = new RolloutService.RolloutServiceClient(_channel);
        _control = new ControlService.ControlServiceClient(_channel);
        _payload = payload;
        _copy = new byte[payload.Bytes.Length];
        _copy.AsSpan().Fill(1);
        _cancellation = cancellation;
    }

    public static async Task<WeightUpdatesResult> MeasureAsync(int repeats, IProgress<string> progress, CancellationToken cancellation)
    {
        progress.Report("machine limits");
        double gflops = MachineLimits.MeasureFmaGflops(Environment.ProcessorCount);
        double gbps = MachineLimits.MeasureReadGBps(Environment.ProcessorCount);

        string folder = Directory.CreateTempSubdirectory("rollout-load-").FullName;
        try
        {
            progress.Report("writing the model");
            ShapeS.Write(folder);
            cancellation.ThrowIfCancellationRequested();
            UpdatePayload payload = UpdatePayload.Read(folder);

            progress.Report("starting the server");
            string socket = Path.Combine(folder, "s");
            await using SidecarProcess server = await SidecarProcess.StartAsync(new SidecarOptions
            {
                Program = typeof(WeightUpdates).Assembly.GetCustomAttributes<AssemblyMetadataAttribute>()
                    .Single(attribute => attribute.Key == "RolloutProgram").Value!,
                ModelFolder = folder,
                SocketPath = socket,
                ExtraArguments = ["--max-context", $"{MaxContext}", "--max-sequences", $"{BackgroundDecode.Sequences}"],
                StopTimeout = TimeSpan.FromSeconds(5),
            }, cancellation);
            File.Delete(Path.Combine(folder, ShapeS.WeightsFile)); // so that the disk does not write it during the measurement

            using WeightUpdates updates = new(socket, payload, cancellation);
            StatusReply status = await updates._control.StatusAsync(new StatusRequest(), cancellationToken: cancellation);
            updates._version = status.Version;
            List<Round> rounds = [];
            for (int i = 0; i <= repeats; i++)
            {
                progress.Report(i == 0 ? "warm-up" : $"round {i} of {repeats}");
                Round round = await updates.MeasureRoundAsync();
                if (i > 0) rounds.Add(round); // warm-up: includes compilation and first touches of pages
            }

            return new WeightUpdatesResult
            {
                Backend = status.Backend,
                FmaGflops = gflops,
                ReadGBps = gbps,
                Bytes = payload.Bytes.Length,
                Memcpy = Median(rounds, round => round.Memcpy),
                SharedMemory = Median(rounds, round => round.SharedMemory),
                Stall = Median(rounds, round => round.Loaded.Stall),
                Step = Median(rounds, round => round.Loaded.Step),
                InPlace = updates._noInPlace is null ? Median(rounds, round => round.InPlace!.Value) : null,
                NoInPlace = updates._noInPlace,
                Inline = Median(rounds, round => round.Inline),
                Socket = Median(rounds, round => round.Socket),
                SharedMemoryLoaded = Median(rounds, round => round.Loaded.Latency),
                CommitGap = Median(rounds, round => round.Loaded.CommitGap),
                TransferGap = Median(rounds, round => round.Loaded.TransferGap),
            };
        }
        catch (RpcException) when (cancellation.IsCancellationRequested)
        {
            throw new OperationCanceledException(cancellation);
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    public void Dispose() => _channel.Dispose();

    private async Task<Round> MeasureRoundAsync()
    {
        double memcpy = MachineCopies.Memcpy(_payload.Bytes, _copy);
        double shared = (await SharedMemoryAsync(V1.UpdateMode.Staged)).Latency;
        LoadedUpdate loaded = await LoadedAsync();
        double? inPlace = _noInPlace is null ? await InPlaceAsync() : null;
        double inline = await InlineAsync();
        _cancellation.ThrowIfCancellationRequested();
        double socket = MachineCopies.UnixSocket(_payload.Bytes);
        return new Round(memcpy, shared, loaded, inPlace, inline, socket);
    }

    /// <summary>The payload is in shared memory: from telling the server where, to its reply that the weights are served.</summary>
    private async Task<TimedUpdate> SharedMemoryAsync(V1.UpdateMode mode)
    {
        using UpdateCall update = await BeginAsync(mode);
        return await SendSharedMemoryAsync(update);
    }

    private async Task<TimedUpdate> SendSharedMemoryAsync(UpdateCall update)
    {
        string path = PutInto(update.Ready.Segment);
        long begun = Stopwatch.GetTimestamp();
        // The commit is sent immediately after: the server waits for the payload in any case.
        await update.SendAsync(new UpdateRequest { SharedMemory = new SharedMemory { Path = path } });
        Committed committed = await CommitAsync(update);
        long ended = Stopwatch.GetTimestamp();
        return new TimedUpdate(begun, ended, committed.Timings);
    }

    /// <summary>The payload in the server's segment, written once: the server keeps it.</summary>
    private string PutInto(Segment segment)
    {
        if (_filled == segment.Name) return segment.Path;
        using FileStream memory = new(segment.Path, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite, bufferSize: 0);
        memory.Write(_payload.Bytes);
        _filled = segment.Name;
        return segment.Path;
    }

    private async Task<LoadedUpdate> LoadedAsync()
    {
        await using BackgroundDecode decode = await BackgroundDecode.StartAsync(
            _rollout, _control, MaxContext - BackgroundDecode.PromptTokens, _cancellation);
        long quietFrom = Stopwatch.GetTimestamp();
        double step = await decode.MeasureStepAsync(s_stepWindow);
        double usual = Median(decode.Gaps(quietFrom, Stopwatch.GetTimestamp()), gap => gap);

        TimedUpdate update = await SharedMemoryAsync(V1.UpdateMode.Staged);
        await decode.NextStepAsync();
        await decode.NextStepAsync();

        // The swap happened within the server's swap time before its answer; what came before is the transfer.
        long swapping = update.Ended - (long)(update.Timings.SwapSeconds * Stopwatch.Frequency) - (Stopwatch.Frequency / 1000);
        double transferGap = decode.Gaps(update.Begun, swapping).Max() - usual;
        double commitGap = decode.Gaps(swapping, update.Ended).Max() - usual;
        return new LoadedUpdate(step, update.Timings.StallSeconds, update.Latency, transferGap, commitGap);
    }

    private async Task<double?> InPlaceAsync()
    {
        using UpdateCall update = await BeginAsync(V1.UpdateMode.InPlace);
        if (update.Ready.Mode == V1.UpdateMode.InPlace) return (await SendSharedMemoryAsync(update)).Timings.StallSeconds;
        _noInPlace = $"the server was asked to update in place and answered with mode {update.Ready.Mode}";
        await update.AbortAsync("measured in place only");
        return null;
    }

    /// <summary>From the first chunk to the server's reply that the weights are served.</summary>
    private async Task<double> InlineAsync()
    {
        using UpdateCall update = await BeginAsync(V1.UpdateMode.Staged);
        long begun = Stopwatch.GetTimestamp();
        for (int at = 0; at < _payload.Bytes.Length; at += ChunkBytes)
        {
            Memory<byte> piece = _payload.Bytes.AsMemory(at, Math.Min(ChunkBytes, _payload.Bytes.Length - at));
            Chunk chunk = new() { Offset = (ulong)at, Data = UnsafeByteOperations.UnsafeWrap(piece) };
            await update.SendAsync(new UpdateRequest { Chunk = chunk });
        }

        await CommitAsync(update);
        return Stopwatch.GetElapsedTime(begun).TotalSeconds;
    }

    private Task<UpdateCall> BeginAsync(V1.UpdateMode mode)
    {
        BeginUpdate begin = new()
        {
            PayloadBytes = (ulong)_payload.Bytes.Length,
            BaseVersion = _version,
            NewVersion = _version + 1,
            Policy = V1.UpdatePolicy.Keep,
            Owner = "perf/load",
            Mode = mode,
            DeadlineMilliseconds = 60_000,
            SegmentBytes = (ulong)_payload.Bytes.Length,
        };
        begin.Manifest.AddRange(_payload.Manifest);
        return UpdateCall.BeginAsync(_weights, begin, _cancellation);
    }

    private async Task<Committed> CommitAsync(UpdateCall update)
    {
        await update.SendAsync(new UpdateRequest { Commit = new Commit { Digest = _payload.Digest } });
        Committed committed = await update.Committed;
        _version = committed.Version;
        return committed;
    }

    private static GrpcChannel Open(string socketPath)
    {
        UnixDomainSocketEndPoint endPoint = new(socketPath);
        SocketsHttpHandler handler = new()
        {
            UseProxy = false,
            ConnectCallback = async (_, cancellation) => await SidecarSocket.ConnectAsync(endPoint, cancellation),
        };
        return GrpcChannel.ForAddress("http://localhost",
            new GrpcChannelOptions { HttpHandler = handler, DisposeHttpClient = true, MaxReceiveMessageSize = null });
    }

    private static double Median<T>(IReadOnlyCollection<T> items, Func<T, double> value)
        => items.Select(value).Order().ElementAt(items.Count / 2);

    private sealed record Round(double Memcpy, double SharedMemory, LoadedUpdate Loaded, double? InPlace, double Inline, double Socket);

    private sealed record LoadedUpdate(double Step, double Stall, double Latency, double TransferGap, double CommitGap);

    private sealed record TimedUpdate(long Begun, long Ended, UpdateTimings Timings)
    {
        public double Latency => Stopwatch.GetElapsedTime(Begun, Ended).TotalSeconds;
    }
}
