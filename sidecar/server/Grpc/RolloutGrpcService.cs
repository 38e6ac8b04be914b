using Grpc.Core;
using Rollout.Engine;
using Rollout.Server.Generation;
using Rollout.Server.Hosting;
using Rollout.V1;
using Problem = Rollout.Engine.Problem;

namespace Rollout.Server.Grpc;

/// <summary>rollout.v1.RolloutService: generation, scores and aborts.</summary>
internal sealed class RolloutGrpcService(EngineHost host, ILogger<RolloutGrpcService> logger) : RolloutService.RolloutServiceBase
{
    public override async Task Generate(
        GenerateRequest request, IServerStreamWriter<GenerateReply> responseStream, ServerCallContext context)
    {
        CancellationToken cancellation = context.CancellationToken;
        await using GroupStream group = Start(request);
        await foreach (GroupReply reply in group.ReadAsync(cancellation))
            await responseStream.WriteAsync(Replies.Reply(group.Request.Id, reply), cancellation);
    }

    public override Task GenerateBatch(
        IAsyncStreamReader<GenerateRequest> requestStream, IServerStreamWriter<GenerateReply> responseStream, ServerCallContext context)
        => new BatchCall(Start, responseStream, logger).RunAsync(requestStream.ReadAllAsync(), host.Stopping, context.CancellationToken);

    public override Task<ScoreReply> Score(ScoreRequest request, ServerCallContext context)
        => EngineCalls.ScoreAsync(host.Admitting, request, context.CancellationToken);

    public override async Task<AbortReply> Abort(AbortRequest request, ServerCallContext context)
    {
        IReadOnlyCollection<string>? ids = request.WhichCase switch
        {
            AbortRequest.WhichOneofCase.Ids => request.Ids.Ids,
            AbortRequest.WhichOneofCase.All when request.All => null,
            AbortRequest.WhichOneofCase.All => throw Invalid("all", "must be true; name the ids to end only some groups"),
            _ => throw Invalid("which", "either ids or all must be given"),
        };
        AbortCounts counts = await host.Engine.AbortAsync(ids);
        Log.Aborted(logger, counts.Groups, counts.Sequences, counts.Unknown.Count);
        return new AbortReply { Groups = (uint)counts.Groups, Samples = (uint)counts.Sequences, Unknown = { counts.Unknown } };
    }

    private GroupStream Start(GenerateRequest request)
    {
        UnknownFields.Refuse(request);
        GroupStream group = host.Start(engine => EngineCalls.Start(engine, request));
        Log.GroupStarted(logger, group.Request.Id, group.Request.Prompt.Length, group.Request.N);
        return group;
    }

    private static InvalidRequestException Invalid(string field, string message) => new([new Problem(field, message)]);
}
