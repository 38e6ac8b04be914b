using System.Globalization;
using Google.Protobuf;
using Grpc.Core;
using Rollout.V1;
using ReplyCase = Rollout.V1.UpdateReply.StepOneofCase;

namespace Rollout.Server.Tests;

internal enum Route
{
    Inline,
    SharedMemory,
    File,
}

internal enum Fault
{
    None,
    Abort,
    Reset,
    ResetInCommit,
    CloseSide,
    WrongDigest,
    FlippedBit,
    Reordered,
    Truncated,
    Deadline,
    SecondTrainer,
    WrongBase,
    MissingSource,
}

/// <summary>One update and what is wrong with it.</summary>
/// <param name="Scope">The tensors that are sent.</param>
/// <param name="Target">The weights served if it commits.</param>
/// <param name="Messages">Number of messages of the payload.</param>
/// <param name="At">The message before which it breaks.</param>
internal sealed record Push(
    Scope Scope, Content Target, Route Route, UpdateMode Mode, UpdatePolicy Policy, int Messages, Fault Fault, int At)
{
    public bool InPlace => Mode == UpdateMode.InPlace;
}

/// <summary>
/// Random steps against one server, and a model of its expected state: which weights are served, to the bit, or none; paused; asleep. Where
/// a step has more than one possible outcome, such as a stream that breaks during a commit, the server reports the outcome, and later
/// checks hold it to that.
/// </summary>
internal sealed class FaultCampaign(ServerProcess server, Variants variants) : IDisposable
{
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(20);

    private readonly TemporaryFolder _shm = new("/dev/shm/rollout-faults-");
    private readonly TemporaryFolder _disk = new();
    private readonly List<string> _steps = [];
    private readonly HashSet<ulong> _served = [0];
    private readonly HashSet<MemoryTag> _asleep = [];
    private Content? _content = new Content(false, false); // null: poisoned, no known weights
    private ulong _version;
    private bool _paused;
    private Task<List<SampleChunk>>? _generation;
    private bool _mayAbort;
    private int _pushes;

    /// <summary>Owners of the updates that committed.</summary>
    public HashSet<string> Committed { get; } = [];

    /// <summary>How often each outcome was seen, to show that a campaign covers several.</summary>
    public SortedDictionary<string, int> Ends { get; } = [];

    /// <summary>A few random steps; ends with the server running on known weights.</summary>
    public async Task RunAsync(int seed)
    {
        _steps.Clear();
        try
        {
            Random random = new(seed);
            for (int i = random.Next(2, 7); i > 0; i--)
            {
                await StepAsync(random);
                await CheckAsync();
            }

            await SettleAsync(random);
            await CheckAsync();
        }
        catch (Exception e)
        {
            throw new InvalidOperationException($"fault sequence {seed} failed: {e.Message}\n  {string.Join("\n  ", _steps)}", e);
        }
    }

    public void Dispose()
    {
        _shm.Dispose();
        _disk.Dispose();
    }

    private Task StepAsync(Random random) => random.Next(100) switch
    {
        < 70 => PushAsync(RandomPush(random)),
        < 78 => PauseAsync(PauseMode.Keep),
        < 84 => ResumeAsync(),
        < 88 => SleepAsync(random.Next(2) == 0 ? [MemoryTag.KvCache] : [MemoryTag.Weights, MemoryTag.KvCache]),
        < 91 => WakeUpAsync(),
        _ => GenerateAsync(random),
    };

    private Push RandomPush(Random random)
    {
        Scope scope = (Scope)random.Next(4);
        Content known = _content ?? default;
        Content target = Content.Random(random);
        if (scope == Scope.First) target = target with { Second = known.Second };
        if (scope is Scope.Second or Scope.Sparse) target = target with { First = known.First };
        Route route = scope == Scope.Sparse ? (Route)random.Next(2) : (Route)random.Next(3);
        UpdatePolicy policy = (UpdatePolicy)random.Next(1, 5);
        if (policy == UpdatePolicy.Drain && _paused) policy = UpdatePolicy.Recompute; // would wait for the pause's end
        Fault fault = random.Next(3) == 0 ? Fault.None : (Fault)random.Next(Enum.GetValues<Fault>().Length);
        int messages = route == Route.File ? 1 : random.Next(1, 9);
        UpdateMode mode = random.Next(5) < 3 ? UpdateMode.Staged : UpdateMode.InPlace;
        return new Push(scope, target, route, mode, policy, messages, fault, random.Next(messages + 1));
    }

    /// <summary>Returns the server to running on known weights.</summary>
    private async Task SettleAsync(Random random)
    {
        if (_asleep.Count > 0) await WakeUpAsync();
        UpdateMode healer = random.Next(2) == 0 ? UpdateMode.Staged : UpdateMode.InPlace;
        if (_content is null)
            await PushAsync(new Push(Scope.Full, Content.Random(random), Route.Inline, healer, UpdatePolicy.Recompute, 2, Fault.None, 0));
        if (_paused) await ResumeAsync();
        await JoinAsync();
    }

    // ---- Checks.

    /// <summary>Checks that status and tokens are those of the model.</summary>
    private async Task CheckAsync()
    {
        StatusReply status = await SettledAsync();
        EngineState expected = _asleep.Count > 0 ? EngineState.Sleeping : _content is null ? EngineState.Poisoned
            : _paused ? EngineState.Paused : EngineState.Running;
        Assert.True(status.State == expected && status.Version == _version, $"expected {expected} at version {_version}, got {status}");
        if (expected == EngineState.Running)
        {
            SampleChunk sample = Assert.Single(await server.SamplesAsync(Variants.Probe()));
            Assert.True(variants[_content!.Value] == Variants.Bits(sample), $"these are not the tokens of {_content}");
            Assert.All(sample.Versions, span => Assert.Equal(_version, span.Version));
        }
        else if (expected != EngineState.Paused)
        {
            RpcException refused = await Calls.FailsAsync(() => server.SamplesAsync(Variants.Probe()), StatusCode.FailedPrecondition);
            Assert.StartsWith(expected.ToString().ToUpperInvariant(), refused.Status.Detail, StringComparison.Ordinal);
        }
    }

    /// <summary>Waits until the server has noticed a broken stream.</summary>
    private async Task<StatusReply> SettledAsync()
    {
        using CancellationTokenSource patience = new(s_patience);
        while (true)
        {
            StatusReply status = await server.Control.StatusAsync(new StatusRequest(), deadline: Calls.Deadline(5));
            if (!status.Updating) return status;
            patience.Token.ThrowIfCancellationRequested();
            await Task.Delay(2);
        }
    }

    // ---- Updates.

    private async Task PushAsync(Push push)
    {
        ulong next = _version + 1;
        string owner = string.Create(CultureInfo.InvariantCulture, $"push-{++_pushes}");
        bool refused = _asleep.Contains(MemoryTag.Weights);
        bool rejected = push.Fault == Fault.WrongBase || (_content is null && push.Scope != Scope.Full);
        Fault fault = rejected ? Fault.WrongBase : push.Fault;
        UpdateReply? reply = null;
        string end;
        try
        {
            reply = await TransactAsync(push, next, owner);
            end = reply?.StepCase.ToString() ?? "reset";
        }
        catch (RpcException e)
        {
            end = $"{e.StatusCode}: {e.Status.Detail}";
        }

        StatusReply status = await SettledAsync();
        bool poisoned = status.Reason.Contains("half-way", StringComparison.Ordinal)
            || status.Reason.Contains("discarded", StringComparison.Ordinal);
        string became = status.Version == next ? "new" : poisoned ? "poisoned" : "old";
        Note($"{push}: {end}, {became}", $"{(push.InPlace ? "in place" : "staged")} {push.Fault}: {became}");
        if (refused)
        {
            Assert.StartsWith("FailedPrecondition: SLEEPING", end, StringComparison.Ordinal);
            Assert.NotEqual(next, status.Version);
            return;
        }

        // :: What the trainer was told
        ReplyCase[] replies = fault switch
        {
            Fault.None or Fault.SecondTrainer => [ReplyCase.Committed],
            Fault.WrongBase => [ReplyCase.Rejected],
            Fault.Abort or Fault.CloseSide => [ReplyCase.Aborted],
            Fault.Deadline => [ReplyCase.Aborted, ReplyCase.Failed],
            Fault.Reset or Fault.ResetInCommit => [],
            _ => [ReplyCase.Failed],
        };
        Assert.True(replies.Length == 0 ? reply is null : reply is not null && replies.Contains(reply.StepCase),
            $"the answer was {end}, {reply}");

        // :: What it may have become
        bool written = push.InPlace && fault switch
        {
            Fault.WrongDigest or Fault.FlippedBit or Fault.ResetInCommit => true,
            Fault.Abort or Fault.CloseSide or Fault.Reset or Fault.Deadline => push.At > 0,
            Fault.Reordered => Math.Min(push.At, push.Messages - 2) > 0,
            Fault.Truncated => (push.Route == Route.Inline ? push.Messages - 1 : Math.Min(push.At, push.Messages - 1)) > 0,
            _ => false,
        };
        // Messages in transit when the stream broke may not have been processed.
        bool uncertain = fault is Fault.Reset or Fault.ResetInCommit or Fault.Deadline;
        string old = _content is null ? "poisoned" : "old";
        List<string> may = fault switch
        {
            Fault.None or Fault.SecondTrainer => ["new"],
            Fault.ResetInCommit => ["new", old],
            _ => written && !uncertain ? [] : [old],
        };
        if (written) may.Add("poisoned");
        Assert.True(may.Contains(became), $"the weights are {became}, they may be {string.Join(" or ", may)}");
        bool? said = reply?.Failed?.Poisoned ?? reply?.Aborted?.Poisoned;
        if (said is not null && !(uncertain && _content is null)) Assert.Equal(_content is null ? written : became == "poisoned", said);

        // :: What it is from here on
        if (became == "new")
        {
            _content = push.Target;
            _version = next;
            _served.Add(next);
            Committed.Add(owner);
        }
        else if (became == "poisoned")
        {
            _content = null;
        }

        _mayAbort |= became == "poisoned" || push.Policy == UpdatePolicy.Abort;
    }

    /// <summary>The last reply; null where the trainer did not wait for one.</summary>
    private async Task<UpdateReply?> TransactAsync(Push push, ulong next, string owner)
    {
        Sending sending = variants.Send(push.Scope, push.Target);
        byte[] payload = sending.Bytes;
        ulong off = push.Fault == Fault.WrongBase ? 1u : 0;
        BeginUpdate begin = sending.Begin(_version + off, next + off, owner);
        begin.Mode = push.Mode;
        begin.Policy = push.Policy;
        if (push.Fault == Fault.Deadline) begin.DeadlineMilliseconds = 50;
        string path = WriteSource(push, sending, payload);
        List<UpdateRequest> messages = Messages(push, payload, path);

        using Transaction update = new(server.Weights);
        if (await update.BeginAsync(begin) is { } refused) return refused;
        for (int i = 0; i <= messages.Count; i++)
        {
            if (i == push.At)
            {
                switch (push.Fault)
                {
                    case Fault.Abort:
                        await update.SendAsync(new UpdateRequest { Abort = new AbortUpdate { Reason = "changed my mind" } });
                        return await update.EndAsync();
                    case Fault.CloseSide:
                        await update.CloseAsync();
                        return await update.EndAsync();
                    case Fault.Reset: return null;
                    case Fault.Deadline: return await update.EndAsync();
                    case Fault.SecondTrainer:
                        using (Transaction second = new(server.Weights))
                        {
                            BeginUpdate other = sending.Begin(_version, next, "second");
                            RpcException e = await Calls.FailsAsync(() => second.BeginAsync(other), StatusCode.FailedPrecondition);
                            Assert.Contains($"'{owner}'", e.Status.Detail, StringComparison.Ordinal);
                        }

                        break;
                }
            }

            if (i < messages.Count && !await update.SendAsync(messages[i])) return await update.EndAsync();
        }

        UpdateRequest commit = sending.Commit();
        if (push.Fault == Fault.WrongDigest) commit.Commit.Digest = ByteString.CopyFrom(new byte[16]);
        await update.SendAsync(commit);
        if (push.Fault != Fault.ResetInCommit) return await update.EndAsync();
        // Broken at once, the commit is lost; one round trip later, its answer is lost, or it breaks during the commit.
        if (push.At % 2 == 0) await server.Control.StatusAsync(new StatusRequest(), deadline: Calls.Deadline(5));
        return null;
    }

    /// <summary>Writes the payload where the server will read it, with bit flips and truncation.</summary>
    private string WriteSource(Push push, Sending sending, byte[] payload)
    {
        if (push.Fault == Fault.FlippedBit) payload[payload.Length * push.At / (push.Messages + 1)] ^= 0x10;
        if (push.Route == Route.Inline) return "";
        string path = push.Route == Route.SharedMemory ? _shm["payload"] : _disk["payload.safetensors"];
        int header = 0;
        if (push.Route == Route.SharedMemory)
        {
            File.WriteAllBytes(path, payload);
        }
        else
        {
            sending.WriteFile(path);
            using FileStream file = File.OpenWrite(path);
            header = (int)file.Length - payload.Length;
            file.Position = header;
            file.Write(payload);
        }

        if (push.Fault == Fault.MissingSource) File.Delete(path);
        if (push.Fault == Fault.Truncated)
        {
            using FileStream file = File.OpenWrite(path);
            file.SetLength(header + Edges(push, payload.Length)[Math.Min(push.At, push.Messages - 1)] + 1);
        }

        return path;
    }

    private static List<UpdateRequest> Messages(Push push, byte[] payload, string path)
    {
        if (push.Route == Route.File)
        {
            ulong offset = push.Fault == Fault.Reordered ? 8u : 0;
            return [new UpdateRequest { File = new CheckpointFile { Path = path, PayloadOffset = offset } }];
        }

        int[] edges = Edges(push, payload.Length);
        List<UpdateRequest> messages = [.. Enumerable.Range(0, push.Messages).Select(i => push.Route == Route.Inline
            ? Transaction.Chunk(payload, edges[i], edges[i + 1])
            : Transaction.Window(path, edges[i], edges[i + 1]))];
        switch (push.Fault)
        {
            case Fault.Reordered when push.Messages == 1 && push.Route == Route.Inline: messages[0].Chunk.Offset = 8; break;
            case Fault.Reordered when push.Messages == 1: messages[0].SharedMemory.PayloadOffset = 8; break;
            case Fault.Reordered:
                int i = Math.Min(push.At, push.Messages - 2);
                (messages[i], messages[i + 1]) = (messages[i + 1], messages[i]);
                break;
            case Fault.Truncated when push.Route == Route.Inline: messages.RemoveAt(messages.Count - 1); break;
            case Fault.MissingSource when push.Route == Route.Inline: // all of it, and bytes past its end
                messages = [new UpdateRequest { Chunk = new Chunk { Data = ByteString.CopyFrom([.. payload, 1, 2, 3]) } }];
                break;
        }

        return messages;
    }

    /// <summary>Where messages begin and end: at any byte.</summary>
    private static int[] Edges(Push push, int length)
        => [.. Enumerable.Range(0, push.Messages + 1).Select(i => (int)((long)length * i / push.Messages))];

    // ---- Everything else.

    private async Task PauseAsync(PauseMode mode)
    {
        Note($"pause {mode}");
        _mayAbort |= mode == PauseMode.Abort;
        PauseRequest request = new() { Mode = mode, Owner = "faults", LeaseMilliseconds = 120_000 };
        await server.Control.PauseAsync(request, deadline: Calls.Deadline());
        _paused = true;
    }

    private async Task ResumeAsync()
    {
        Note("resume");
        await server.Control.ResumeAsync(new ResumeRequest(), deadline: Calls.Deadline());
        _paused = false;
    }

    private async Task SleepAsync(MemoryTag[] tags)
    {
        await PauseAsync(PauseMode.Abort); // sleep requires that no sample is in flight
        await JoinAsync();
        Note($"sleep {string.Join(", ", tags)}");
        SleepReply reply = await server.Control.SleepAsync(new SleepRequest { Tags = { tags } }, deadline: Calls.Deadline());
        _asleep.UnionWith(tags);
        Assert.Equal(_asleep.Order(), reply.Asleep.Order());
        if (_asleep.Contains(MemoryTag.Weights)) _content = null;
    }

    private async Task WakeUpAsync()
    {
        Note("wake up");
        await server.Control.WakeUpAsync(new WakeUpRequest(), deadline: Calls.Deadline());
        _asleep.Clear();
    }

    /// <summary>Starts samples that are in flight during the next steps.</summary>
    private async Task GenerateAsync(Random random)
    {
        if (_generation is not null || _content is null || _asleep.Count > 0) return;
        Note("generate");
        _mayAbort = false;
        _generation = server.SamplesAsync(Calls.Sampled([3, 4, 5, (uint)random.Next(3, 320)], 40, seed: (ulong)random.Next(), n: 2));
        using CancellationTokenSource patience = new(s_patience);
        while (!_generation.IsCompleted)
        {
            StatusReply status = await server.Control.StatusAsync(new StatusRequest(), deadline: Calls.Deadline(5));
            if (status.Running + status.Waiting > 0) return;
            patience.Token.ThrowIfCancellationRequested();
        }
    }

    private async Task JoinAsync()
    {
        if (_generation is null) return;
        List<SampleChunk> samples = await _generation.WaitAsync(s_patience);
        _generation = null;
        foreach (SampleChunk sample in samples)
        {
            bool whole = sample.FinishReason == FinishReason.Length && sample.Ids.Count == 40;
            Assert.True(whole || (_mayAbort && sample.FinishReason == FinishReason.Abort), $"a sample ended with {sample.FinishReason}");
            Assert.Equal(sample.Versions.OrderBy(span => span.Version), sample.Versions);
            Assert.All(sample.Versions, span => Assert.Contains(span.Version, _served));
        }
    }

    private void Note(string step, string? end = null)
    {
        _steps.Add(step);
        if (end is not null) Ends[end] = Ends.GetValueOrDefault(end) + 1;
    }
}
