using Rollout.Server.Commands;

return await CommandLine.RunAsync(args);
