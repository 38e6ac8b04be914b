using System.Diagnostics;
using Grpc.Core;
using Rollout.V1;

namespace Rollout.Load;

/// <summary>
/// Sequences that decode until this is disposed, with the arrival times of their tokens. A reply that holds the first sample's tokens marks
/// a step: the tokens of one step may come in more than one reply.
/// </summary>
internal sealed class BackgroundDecode : IAsyncDisposable
{
    public const int Sequences = 8;
    public const int PromptTokens = 128;

    private const int Vocabulary = 32768;

    private readonly ControlService.ControlServiceClient _control;
    private readonly AsyncServerStreamingCall<GenerateReply> _call;
    private readonly List<long> _steps = [];
    private readonly Lock _lock = new();
    private readonly Task _reading;
    private TaskCompletionSource _next = new(TaskCreationOptions.RunContinuationsAsynchronously);

    private BackgroundDecode(ControlService.ControlServiceClient control, AsyncServerStreamingCall<GenerateReply> call)
    {
        _control = control;
        _call = call;
        _reading = ReadAsync();
    }

    /// <summary>Returns when all of them decode.</summary>
    public static async Task<BackgroundDecode> StartAsync(
        RolloutService.RolloutServiceClient rollout, ControlService.ControlServiceClient control, int maxTokens,
        CancellationToken cancellation)
    {
        const int Settled = 4; // steps after which prefill is certainly over
        Random random = new(0);
        GenerateRequest request = new()
        {
            PromptIds = new TokenIds(),
            N = Sequences,
            Seed = 1,
            Stream = true,
            Stopping = new StoppingParams { MaxTokens = (uint)maxTokens, IgnoreEos = true },
        };
        for (int i = 0; i < PromptTokens; i++) request.PromptIds.Ids.Add((uint)random.Next(Vocabulary));
        BackgroundDecode decode = new(control, rollout.Generate(request, cancellationToken: cancellation));
        try
        {
            for (int i = 0; i < Settled; i++) await decode.NextStepAsync();
            return decode;
        }
        catch
        {
            await decode.DisposeAsync();
            throw;
        }
    }

    /// <summary>Returns when the tokens of another step have arrived; throws when none will.</summary>
    public Task NextStepAsync()
    {
        lock (_lock) return _next.Task;
    }

    /// <summary>
    /// Seconds a step took over about <paramref name="window"/>: counted by the server, from one step's end to another's.
    /// </summary>
    public async Task<double> MeasureStepAsync(TimeSpan window)
    {
        await NextStepAsync();
        long begun = Stopwatch.GetTimestamp();
        ulong before = (await _control.StatusAsync(new StatusRequest())).Steps;
        await Task.Delay(window);
        await NextStepAsync();
        double seconds = Stopwatch.GetElapsedTime(begun).TotalSeconds;
        ulong steps = (await _control.StatusAsync(new StatusRequest())).Steps - before;
        return seconds / steps;
    }

    /// <summary>Seconds between one step's tokens and the next's, for every such pause that touches the given time.</summary>
    public double[] Gaps(long from, long to)
    {
        lock (_lock)
        {
            return [.. _steps.Zip(_steps.Skip(1)).Where(gap => gap.Second >= from && gap.First <= to)
                .Select(gap => Stopwatch.GetElapsedTime(gap.First, gap.Second).TotalSeconds)];
        }
    }

    /// <summary>Ends the sequences and returns when the server is idle.</summary>
    public async ValueTask DisposeAsync()
    {
        _call.Dispose();
        await _reading;
        using CancellationTokenSource patience = new(TimeSpan.FromSeconds(10));
        try
        {
            StatusRequest status = new();
            while (await _control.StatusAsync(status, cancellationToken: patience.Token) is { Running: > 0 } or { Waiting: > 0 })
                await Task.Delay(5, patience.Token);
        }
        catch (RpcException)
        {
            // The server is gone, and the sequences with it.
        }
    }

    private async Task ReadAsync()
    {
        Exception end;
        try
        {
            while (await _call.ResponseStream.MoveNext(CancellationToken.None))
            {
                if (!_call.ResponseStream.Current.Samples.Any(sample => sample.Index == 0)) continue;
                TaskCompletionSource reached;
                lock (_lock)
                {
                    _steps.Add(Stopwatch.GetTimestamp());
                    reached = _next;
                    _next = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
                }

                reached.SetResult();
            }

            end = new InvalidOperationException("the sequences ended before the measurement did");
        }
        catch (Exception e)
        {
            end = e;
        }

        lock (_lock) _next.SetException(end);
        _ = _next.Task.Exception; // there may be no waiter
    }
}
