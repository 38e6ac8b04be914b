using System.Diagnostics;
using System.Globalization;
using Grpc.Core;
using Rollout.Client;
using Rollout.V1;
using FinishReason = Rollout.V1.FinishReason;
using SampleChunk = Rollout.V1.SampleChunk;
using TensorDType = Rollout.Client.TensorDType;
using UpdateMode = Rollout.Client.UpdateMode;
using UpdatePolicy = Rollout.Client.UpdatePolicy;
using VersionSpan = Rollout.V1.VersionSpan;

namespace Rollout.Server.Tests;

/// <summary>
/// A trainer pushes a thousand times without a pause while samples are drawn without a pause. The weights of every version draw a distinct
/// token, so that each token shows which weights drew it.
/// </summary>
[Collection(Alone.Name)]
public sealed class ThousandUpdatesTests
{
    private const int Hidden = 64;
    private const int Vocabulary = 1021; // more than the updates of a run: no two of them have the same token
    private const int Updates = 1000;
    private const int WarmUp = 3000; // until .NET's memory is stable: 15 MB more than at the start, and then no more
    private const int Lanes = 4;
    private const uint SampleTokens = 48;
    private const uint Mixed = 0;

    /// <summary>
    /// The embedding of every token is the direction of the version, the head's row of the version's token looks that way, and the row of
    /// token 0 looks every other way: an embedding of one version under the head of another draws 0. The block adds nothing.
    /// </summary>
    private static readonly HandMadeModel s_model = new(Hidden, Hidden, layers: 1, Vocabulary, (name, elements) =>
    {
        if (name.EndsWith("norm.weight", StringComparison.Ordinal)) elements.Fill(HandMadeModel.One);
    });

    private static readonly TensorSource[] s_sources = [.. s_model.Tensors.Select(entry =>
        TensorSource.FromMemory(entry.Tensor.Name, TensorDType.BF16, entry.Tensor.Shape, entry.Bytes))];

    private ulong _version;
    private long _tokens;
    private readonly HashSet<ulong> _drew = [];

    private static uint TokenOf(ulong version) => 1 + (uint)(version % (Vocabulary - 1));

    private static void Become(ulong version)
    {
        int direction = (int)(version % Hidden);
        Span<ushort> embedding = s_model["model.embed_tokens.weight"];
        embedding.Clear();
        for (int token = 0; token < Vocabulary; token++) embedding[token * Hidden + direction] = HandMadeModel.One;
        Span<ushort> head = s_model["lm_head.weight"];
        head.Clear();
        head[..Hidden].Fill(HandMadeModel.Half);
        head[direction] = 0;
        head[(int)TokenOf(version) * Hidden + direction] = HandMadeModel.One;
    }

    /// <summary>
    /// What is asserted. Of tokens: every one, of all attempts. Of time: the p99 of a whole push, as the trainer sees it, is at most twice
    /// its p50; on a machine that others use too, no further from it than the p99 of three bare round trips, of which a push also consists,
    /// is from theirs. A DRAIN waits for samples by design and is not counted. Of memory: the median of the server's resident memory over
    /// the last hundred updates is within 1% of that over the first hundred. Of both, in the best of eight attempts of a thousand: a
    /// temporary disturbance passes, and a heap is collected; a leak of more than a kilobyte an update, or a stall, shows every time.
    /// </summary>
    [Fact]
    public async Task A_thousand_updates_draw_the_right_tokens_in_even_time_and_no_more_memory()
    {
        using TemporaryFolder folder = new();
        Become(0);
        s_model.Write(folder.Path);
        // All code is compiled once, at its first use. In tiers, what runs once an update is compiled anew for thousands of updates:
        // measured, resident memory grew from 112 to 127 MB over the first 1,200 and was flat over the 2,800 after them. A first
        // generation of 4 MB is collected every few updates. What survives it grows until the heap is collected whole: over 24,000 updates
        // resident memory moved between 116 and 133 MB, ended at 124, and was flat within 1% in 16 thousands of 24.
        await using ServerProcess server = await ServerProcess.StartAsync(
            folder.Path, [("DOTNET_TieredCompilation", "0"), ("DOTNET_GCgen0size", "0x400000")], "--kv-cache", "8MiB");
        await using RolloutClient client = RolloutClient.Connect(server.Address);
        await using WeightPublisher publisher = new(client);
        using CancellationTokenSource enough = new();
        Task[] lanes = [.. Enumerable.Range(0, Lanes).Select(lane => Task.Run(() => DrawAsync(server, lane, enough.Token)))];

        await PushAsync(server, client, publisher, lanes, WarmUp);
        bool even = false;
        bool flat = false;
        for (int attempt = 1; attempt <= 8 && !(even && flat); attempt++)
        {
            Run run = await PushAsync(server, client, publisher, lanes, Updates);
            Print(run);
            even |= run.Whole.Tail <= Math.Max(2, run.Asking.Tail);
            flat |= Math.Abs(run.ResidentLast - run.ResidentFirst) <= run.ResidentFirst / 100;
            Assert.InRange(run.Stall.P50, 0, 1e-3);
        }

        enough.Cancel();
        await Task.WhenAll(lanes);
        Print($"{_tokens} tokens in all, {_drew.Count} of {_version + 1} versions drew some");
        Assert.InRange(_drew.Count, (int)_version / 2, (int)_version + 1); // generation went on all the time
        Assert.True(even, "the slowest pushes take more than twice the usual time, and bare calls do not");
        Assert.True(flat, "the server's resident memory is not flat within 1%");
    }

    private sealed record Run
    {
        /// <summary>Seconds of a push but a DRAIN, of three round trips before it, and of what the server says no step could run.</summary>
        public required Percentiles Whole { get; init; }

        public required Percentiles Asking { get; init; }

        public required Percentiles Stall { get; init; }

        public required double MedianDrain { get; init; }

        public required double ResidentFirst { get; init; }

        public required double ResidentLast { get; init; }

        public override string ToString()
            => string.Create(CultureInfo.InvariantCulture, $"push {Whole} ms, three round trips {Asking} ms, stall {Stall} ms, "
                + $"drain p50 {MedianDrain * 1e3:F1} ms; resident {ResidentFirst / 1e6:F1} MB over the first 100 updates, "
                + $"{ResidentLast / 1e6:F1} MB over the last");
    }

    private readonly record struct Percentiles(double P50, double P99, double Max)
    {
        public double Tail => P99 / P50;

        public static Percentiles Of(List<double> seconds)
        {
            seconds.Sort();
            return new Percentiles(seconds[seconds.Count / 2], seconds[seconds.Count * 99 / 100], seconds[^1]);
        }

        public override string ToString()
            => string.Create(CultureInfo.InvariantCulture, $"p50 {P50 * 1e3:F3} p99 {P99 * 1e3:F3} max {Max * 1e3:F3}");
    }

    /// <summary>Pushes so many times in a row.</summary>
    private async Task<Run> PushAsync(ServerProcess server, RolloutClient client, WeightPublisher publisher, Task[] lanes, int updates)
    {
        List<double> whole = [];
        List<double> drains = [];
        List<double> asking = [];
        List<double> stall = [];
        List<double> resident = [];
        for (int i = 0; i < updates; i++)
        {
            UpdatePolicy policy = (i % 100) switch
            {
                49 => UpdatePolicy.Abort,
                99 => UpdatePolicy.Drain,
                _ => i % 2 == 0 ? UpdatePolicy.Recompute : UpdatePolicy.Keep,
            };
            long asked = Stopwatch.GetTimestamp();
            for (int trip = 0; trip < 3; trip++) await client.StatusAsync();
            asking.Add(Stopwatch.GetElapsedTime(asked).TotalSeconds);
            Become(_version + 1);
            PushOptions options = new() { Policy = policy, Mode = UpdateMode.Staged };
            PushResult pushed = await publisher.PushAsync(s_sources, options: options);
            Assert.Equal(++_version, pushed.Version);
            if (lanes.FirstOrDefault(lane => lane.IsCompleted) is { } wrong) await wrong;
            (policy == UpdatePolicy.Drain ? drains : whole).Add(pushed.Timings.Total);
            stall.Add(pushed.Timings.ServerStall);
            resident.Add(server.ResidentBytes);
        }

        return new Run
        {
            Whole = Percentiles.Of(whole),
            Asking = Percentiles.Of(asking),
            Stall = Percentiles.Of(stall),
            MedianDrain = Percentiles.Of(drains).P50,
            ResidentFirst = Percentiles.Of(resident[..100]).P50,
            ResidentLast = Percentiles.Of(resident[^100..]).P50,
        };
    }

    /// <summary>Draws one group after the other and checks every token against the weights it says it is of.</summary>
    private async Task DrawAsync(ServerProcess server, int lane, CancellationToken enough)
    {
        GenerateRequest request = Calls.Greedy([1, 2, 3, (uint)lane], SampleTokens, r =>
        {
            r.N = 2;
            r.Stream = lane == 0; // the others' tokens come all at once, with as many spans
        });
        while (!enough.IsCancellationRequested)
        {
            uint[] drawn = new uint[request.N];
            ulong[] version = new ulong[request.N];
            using AsyncServerStreamingCall<GenerateReply> call = server.Rollout.Generate(request, deadline: Calls.Deadline());
            await foreach (GenerateReply reply in call.ResponseStream.ReadAllAsync(CancellationToken.None))
            {
                foreach (SampleChunk chunk in reply.Samples)
                {
                    Assert.Equal(drawn[chunk.Index], chunk.Start);
                    foreach (VersionSpan span in chunk.Versions)
                    {
                        Assert.Equal(drawn[chunk.Index], span.Start);
                        Assert.True(span.Version >= version[chunk.Index], $"version {span.Version} after {version[chunk.Index]}");
                        version[chunk.Index] = span.Version;
                        for (; drawn[chunk.Index] < span.End; drawn[chunk.Index]++)
                        {
                            uint token = chunk.Ids[(int)(drawn[chunk.Index] - chunk.Start)];
                            Assert.True(token == TokenOf(span.Version), token == Mixed
                                ? $"a token of version {span.Version} was drawn from a mixture of two"
                                : $"token {token} says it is of version {span.Version}, whose token is {TokenOf(span.Version)}");
                        }

                        lock (_drew) _drew.Add(span.Version);
                    }

                    Assert.Equal(chunk.Start + (uint)chunk.Ids.Count, drawn[chunk.Index]);
                    Interlocked.Add(ref _tokens, chunk.Ids.Count);
                    Assert.True(chunk.FinishReason switch
                    {
                        FinishReason.Unspecified or FinishReason.Abort => true,
                        FinishReason.Length => drawn[chunk.Index] == SampleTokens,
                        _ => false,
                    }, $"{chunk.FinishReason} after {drawn[chunk.Index]} tokens {chunk.Error}");
                }
            }
        }
    }

    private static void Print(object line) => TestContext.Current.TestOutputHelper!.WriteLine($"{line}");
}
