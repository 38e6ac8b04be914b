using System.Runtime.CompilerServices;
using Rollout.Engine;
using Rollout.Server.Grpc;
using Rollout.V1;

namespace Rollout.Server.Commands;

/// <summary>The engine in this process.</summary>
internal sealed class LocalRollouts(RolloutEngine engine) : IRollouts
{
    public Tokenizer? Tokenizer => engine.Tokenizer;

    public async IAsyncEnumerable<GenerateReply> GenerateAsync(
        GenerateRequest request, [EnumeratorCancellation] CancellationToken cancellation)
    {
        await using GroupCall call = GroupCall.Start(engine, request);
        await foreach (GenerateReply reply in call.ReadAsync(cancellation)) yield return reply;
        call.ThrowIfFaulted();
    }

    public Task<ScoreReply> ScoreAsync(ScoreRequest request, CancellationToken cancellation)
        => GroupCall.ScoreAsync(engine, request, cancellation);

    public ValueTask DisposeAsync() => engine.DisposeAsync();
}
