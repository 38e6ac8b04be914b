using System.Runtime.CompilerServices;
using Rollout.Engine;
using Rollout.Server.Generation;
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
        await using GroupStream group = EngineCalls.Start(engine, request);
        await foreach (GroupReply reply in group.ReadAsync(cancellation)) yield return Replies.Reply(group.Request.Id, reply);
    }

    public Task<ScoreReply> ScoreAsync(ScoreRequest request, CancellationToken cancellation)
        => EngineCalls.ScoreAsync(engine, request, cancellation);

    public ValueTask DisposeAsync() => engine.DisposeAsync();
}
